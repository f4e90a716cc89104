"""A Spike-driven Transformer, or one part of it, as additions on bits: BatchNorm folded, neurons in the convolutions.

After the first convolution every layer adds weight rows of active inputs, and only spikes, one bit each, travel between
layers. The currents of a neuron never leave the cache.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, K classes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv
from module.sparse.program import Map, Output, Program, Weights, read, read_spikes
from module.sps import MS_SPS

_SHAPES = 8  # of inputs whose programs are kept


class Network:
    """The convolutions of `root` with BatchNorm folded in, and the ways of its parts.

    `u` are membrane values, `s` spikes. A part gets both: `s` are those of its first neurons. `then` are the neurons
    that follow it and give the `s` of the next part.
    """

    def __init__(self, root: nn.Module) -> None:
        self.layers: dict[str, Weights] = {}
        with torch.no_grad():
            for name, layer in root.named_modules():
                if isinstance(layer, nn.Conv2d):
                    self.layers[name] = Weights.of(layer, root.get_submodule(name.replace("conv", "bn")))
            if isinstance(head := getattr(root, "head", None), nn.Linear):
                self.layers["head"] = Weights.of_tensors(head.weight.detach()[:, :, None, None], head.bias)
        self.program_for = functools.lru_cache(_SHAPES)(functools.partial(self._program, root))

    def logits(self, x: Tensor) -> Tensor:
        """The whole network: `[T, B, C, H, W]` -> `[T, B, K]`."""
        frames = x[:1] if x.stride(0) == 0 else x  # the same image at each step
        program, given, result, spikes = self.program_for(len(x), *frames.shape)
        memory = program.run(given, frames)
        return (read_spikes if spikes else read)(memory, result).flatten(2)

    def _program(
        self, model: Any, T: int, frames: int, B: int, C: int, H: int, W: int
    ) -> tuple[Program, Map, Map, bool]:
        """For frames of that shape (1 or T): the program, its input and its output, and whether that is spikes."""
        p = Program(self.layers)
        x = p.values("image", frames, B, H, W, C)
        parts: list[tuple[str, nn.Module, nn.Module]] = []
        for i, block in enumerate(model.block):
            parts.append((f"block.{i}.attn.", block.attn, block.attn.shortcut_lif))
            parts.append((f"block.{i}.mlp.", block.mlp, block.mlp.fc1_lif))
        first = [neurons for *_, neurons in parts]
        u, s = self.patch_embed(p, "patch_embed.", model.patch_embed, x, T, first[0])
        for (name, part, _), then in zip(parts, [*first[1:], None], strict=True):
            u, s = self.part(p, name, part, u, s, then)
        s = p.fire(p.mean(u, "mean"), "s", model.head_lif)
        if "head" not in self.layers:
            return p, x, s, True
        ((logits, _),) = p.convolve(s, Output("head", values="logits"))
        return p, x, logits, False

    def patch_embed(self, p: Program, name: str, sps: MS_SPS, x: Map, T: int, then: Any = None) -> tuple[Map, Map]:
        """Images or frames -> membrane values, and what `then` fires."""
        s = p.image(x, T, Output(f"{name}proj_conv", spikes="stage", neuron=sps.proj_lif))
        s = self._pooled(p, sps.maxpool, s, "stage pooled")
        for i, neuron, pool in ((1, sps.proj_lif1, sps.maxpool1), (2, sps.proj_lif2, sps.maxpool2)):
            ((_, s),) = p.convolve(s, Output(f"{name}proj_conv{i}", spikes=f"stage {i}", neuron=neuron))
            s = self._pooled(p, pool, s, f"stage {i} pooled")
        last = f"{name}proj_conv3"
        if isinstance(sps.maxpool3, nn.MaxPool2d):
            ((u, _),) = p.convolve(s, Output(last, values="stage 3"))
            u, s = p.pool_values(u, "u", "stage 3 fired", sps.proj_lif3)
        else:
            ((u, s),) = p.convolve(s, Output(last, values="u", spikes="stage 3 fired", neuron=sps.proj_lif3))
        return self._shortcut(p, f"{name}rpe_conv", u, s, then)

    def part(self, p: Program, name: str, part: Any, u: Map, s: Map, then: Any = None) -> tuple[Map, Map]:
        """Self-attention or MLP."""
        return (self._attention if isinstance(part, MS_SSA_Conv) else self._mlp)(p, name, part, u, s, then)

    def _attention(self, p: Program, name: str, attn: MS_SSA_Conv, u: Map, s: Map, then: Any) -> tuple[Map, Map]:
        neurons = {"q": attn.q_lif, "k": attn.k_lif, "v": attn.v_lif}
        made = p.convolve(s, *(Output(f"{name}{x}_conv", spikes=x, neuron=neuron) for x, neuron in neurons.items()))
        (_, q), (_, k), (_, v) = made
        masked = p.attend(q, k, v, attn.talking_heads_lif)
        return self._shortcut(p, f"{name}proj_conv", u, masked, then)

    def _mlp(self, p: Program, name: str, mlp: MS_MLP_Conv, u: Map, s: Map, then: Any) -> tuple[Map, Map]:
        first, residual = f"{name}fc1_conv", "u" if mlp.shortcut_after_fc1 else None
        ((_, hidden),) = p.convolve(
            s, Output(first, values=residual, spikes="hidden", neuron=mlp.fc2_lif, residual=u if residual else None)
        )
        return self._shortcut(p, f"{name}fc2_conv", u, hidden, then)

    @staticmethod
    def _shortcut(p: Program, layer: str, u: Map, s: Map, then: Any) -> tuple[Map, Map]:
        """A convolution of `s` that is added to the membrane values `u`, in place."""
        made = Output(layer, values="u", spikes=None if then is None else "s", neuron=then, residual=u)
        ((u, s),) = p.convolve(s, made)
        return u, s

    @staticmethod
    def _pooled(p: Program, pool: nn.Module, s: Map, name: str) -> Map:
        return p.pool_spikes(s, name) if isinstance(pool, nn.MaxPool2d) else s
