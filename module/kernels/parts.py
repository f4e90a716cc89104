"""Substitutes of patch splitting, attention and MLP: the same layers, computed together where possible.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.kernels import attention, cpu, triton_device
from module.kernels.fusion import (
    can_fuse_neurons,
    can_fuse_norms,
    channels_innermost,
    convolved,
    is_folded,
    neighbours_pooled,
    norm_add,
    norm_neuron,
    norm_neuron_pool,
    norms_neurons,
    pooled,
)
from module.kernels.lif import once
from module.kernels.neurons import KernelLIF, KernelNeuron
from module.kernels.substitute import Substitute, autocast_dtype, watched
from module.layers import over_time
from module.mlp import MS_MLP_Conv
from module.sps import MS_SPS

INPUT = ""  # see `FusedPart.neurons`


class FusedPart(Substitute):
    """A part whose layers are computed together: on a CPU by the kernels of module/kernels/csrc, on CUDA by Triton's.

    Attributes:
        neurons: for the proof, each neuron in order of computation, and the BatchNorm whose bias shifts its current (or
            several names: the first that is there and has a bias); `INPUT`: the part's input does; None: its current
            is a sum of spikes.
    """

    runs_as = "compiled kernels"  # on a CPU
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]]

    def may_be_static(self) -> bool:
        """Whether its input may be the same at each step, as that of the parts that see an image first."""
        return False

    def may_run(self, x: Tensor) -> bool:
        # Evaluation with gradients (a saliency map) is computed plainly: the kernels of evaluation have none.
        return (self.training or not torch.is_grad_enabled()) and super().may_run(x)


class FusedSPS(FusedPart, MS_SPS):
    plain_class: ClassVar[type[nn.Module]] = MS_SPS
    stands_for: ClassVar[dict[str, str]] = {
        "module.sps:MS_SPS.forward": "2873216da8b6d0ed",
        "module.layers:over_time": "784d7585bdd8ffa2",
    }
    # Winograd's algorithm, which computes the gradients of wide 3 x 3 convolutions: up to 3e-6 was measured.
    gradient_tolerance = 1e-5
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {
        "proj_lif": ("proj_bn", "proj_conv"),
        "proj_lif1": ("proj_bn1", "proj_conv1"),
        "proj_lif2": ("proj_bn2", "proj_conv2"),
        "proj_lif3": ("proj_bn3", "proj_conv3"),
    }

    def may_be_static(self) -> bool:
        return True

    def fast_forward(self, x: Tensor) -> Tensor:
        steps = x.shape[0]
        s = norm_neuron_pool(self.proj_bn, self.proj_lif, self.maxpool, self._first_current(x), steps)
        s = norm_neuron_pool(self.proj_bn1, self.proj_lif1, self.maxpool1, convolved(self.proj_conv1, s))
        s = norm_neuron_pool(self.proj_bn2, self.proj_lif2, self.maxpool2, convolved(self.proj_conv2, s))
        x = pooled(self.maxpool3, norm_add(self.proj_bn3, convolved(self.proj_conv3, s)))  # [T, B, D, H', W']
        return norm_add(self.rpe_bn, convolved(self.rpe_conv, self.proj_lif3(x)), x)

    def _first_current(self, x: Tensor) -> Tensor:
        """The first convolution of `x` `[T, B, C, H, W]`; `[1, B, c, H, W]` for a static image (see `once`).

        Batch statistics over T equal copies are those over one. A watched convolution sees every step.
        """
        if not watched(self.proj_conv):
            x = once(x)
        # Set for the output as well: the layout of an image with one channel tells torch nothing.
        return channels_innermost(over_time(channels_innermost(x), self.proj_conv))


class FusedSSA(FusedPart, MS_SSA_Conv):
    plain_class: ClassVar[type[nn.Module]] = MS_SSA_Conv
    stands_for: ClassVar[dict[str, str]] = {
        "module.attention:MS_SSA_Conv.forward": "3225509fd151238d",
        "module.attention:MS_SSA_Conv._attend": "0929b7a5af6a0b1f",
        "module.attention:MS_SSA_Conv._split_heads": "ea2d94f3cbc603c1",
        "module.layers:over_time": "784d7585bdd8ffa2",
    }
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {
        "shortcut_lif": INPUT,
        "q_lif": ("q_bn", "q_conv"),
        "k_lif": ("k_bn", "k_conv"),
        "v_lif": ("v_bn", "v_conv"),
        "talking_heads_lif": None,
    }

    def fast_forward(self, x: Tensor) -> Tensor:
        x = channels_innermost(x)
        s = self.shortcut_lif(x)
        y = self._attend_at_once(s) if self._can_attend_at_once(s) else self._attend_by_layers(s)
        return norm_add(self.proj_bn, over_time(self.x_after_qkv(y), self.proj_conv), x)

    def _attend_by_layers(self, s: Tensor) -> Tensor:
        H, W = s.shape[-2:]
        q = norm_neuron(self.q_bn, self.q_lif, over_time(s, self.q_conv))
        k = neighbours_pooled(self.k_pool, norm_neuron(self.k_bn, self.k_lif, over_time(s, self.k_conv)))
        v = neighbours_pooled(self.v_pool, norm_neuron(self.v_bn, self.v_lif, over_time(s, self.v_conv)))
        kv = self.kv_before(self._split_heads(k) * self._split_heads(v))  # [T, B, h, N, D/h]
        sums = neighbours_pooled(self.kv_pool, kv).sum(dim=3, keepdim=True)
        mask = self.talking_heads_lif(sums)  # [T, B, h, 1, D/h]
        y = neighbours_pooled(self.x_pool, self._split_heads(q) * mask.to(q.dtype))
        return y.transpose(3, 4).flatten(2, 3).unflatten(3, (H, W))

    def _can_attend_at_once(self, s: Tensor) -> bool:
        """Whether q, k, v can be one product and the attention one operator: nothing watched in between."""
        convs = (self.q_conv, self.k_conv, self.v_conv)
        norms = (self.q_bn, self.k_bn, self.v_bn)
        neurons = (self.q_lif, self.k_lif, self.v_lif, self.talking_heads_lif)
        between = (self.k_pool, self.v_pool, self.kv_before, self.kv_pool, self.x_pool)
        if any(type(layer) is not nn.Identity for layer in between):  # event mode pools over tokens and channels
            return False
        if any(type(n) is not type(neurons[0]) for n in neurons):
            return False
        if not self._share_a_time_constant() and (
            # A time constant each: Triton's kernels take several, for whole blocks of channels.
            not triton_device.runs(s) or self.dim % triton_device.WIDE or is_folded(*norms)
        ):
            return False
        if watched(*convs, *between) or not can_fuse_neurons(s, *neurons):
            return False
        if not triton_device.runs(s) and autocast_dtype("cpu") not in (None, *cpu.DTYPES):
            return False
        if len({(type(c), c.bias is None) for c in convs}) > 1 or any(cpu.same_size_kernel(c) != 1 for c in convs):
            return False
        if len({n.constants() for n in neurons[:3]}) > 1:  # type: ignore[operator]
            return False
        return is_folded(*norms) or (can_fuse_norms(s, *norms) and len({norm.eps for norm in norms}) == 1)

    def _share_a_time_constant(self) -> bool:
        neurons = (self.q_lif, self.k_lif, self.v_lif)
        return all(type(n) is KernelLIF for n in neurons) and len({n.tau for n in neurons}) == 1

    def _attend_at_once(self, s: Tensor) -> Tensor:
        """One product for q, k, v, and sums over tokens per channel, for which heads do not matter."""
        neurons = [n for n in (self.q_lif, self.k_lif, self.v_lif) if isinstance(n, KernelNeuron)]
        assert isinstance(self.talking_heads_lif, KernelNeuron)
        convs, norms = (self.q_conv, self.k_conv, self.v_conv), [self.q_bn, self.k_bn, self.v_bn]
        weight = torch.cat([conv.weight for conv in convs])  # [3 D, D, 1, 1]
        biases = [conv.bias for conv in convs if conv.bias is not None]  # none, or all where BatchNorm was folded
        bias = torch.cat(biases) if biases else None
        # A sparse convolution computes the joined weights its own way.
        convolve = getattr(self.q_conv, "convolve", F.conv2d)
        qkv = convolve(s.flatten(0, 1), weight, bias).unflatten(0, s.shape[:2])  # [T, B, 3 D, H, W]
        if is_folded(*norms):
            qkv = self.q_lif(qkv)
        else:
            qkv = norms_neurons(norms, neurons[:1] if self._share_a_time_constant() else neurons, qkv, len(s))
        mask = self.talking_heads_lif
        keep = torch.is_grad_enabled() and qkv.requires_grad
        return attention.attend(qkv, mask.decay(qkv), *mask.constants(), keep)[0]


class FusedMLP(FusedPart, MS_MLP_Conv):
    plain_class: ClassVar[type[nn.Module]] = MS_MLP_Conv
    stands_for: ClassVar[dict[str, str]] = {
        "module.mlp:MS_MLP_Conv.forward": "18b6a4899aa3eb8b",
        "module.layers:over_time": "784d7585bdd8ffa2",
    }
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {"fc1_lif": INPUT, "fc2_lif": ("fc1_bn", "fc1_conv")}

    def fast_forward(self, x: Tensor) -> Tensor:
        x = channels_innermost(x)
        a = over_time(self.fc1_lif(x), self.fc1_conv)  # [T, B, hidden, H, W]
        if self.shortcut_after_fc1:
            x = norm_add(self.fc1_bn, a, x)
            s = self.fc2_lif(x)
        else:
            s = norm_neuron(self.fc1_bn, self.fc2_lif, a)
        return norm_add(self.fc2_bn, over_time(s, self.fc2_conv), x)


PARTS: dict[type[nn.Module], type[FusedPart]] = {part.plain_class: part for part in (FusedSPS, FusedSSA, FusedMLP)}
