"""The Spike-driven Transformer (Yao et al., NeurIPS 2023, arXiv 2307.01694) and its entries in timm's registry.

Legend: T time steps, B batch, C channels, H x W image, D embed_dims, K classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv, spike_sources_of
from module.folding import fold_batchnorm
from module.grad_checkpointing import run_again_in_backward
from module.mlp import MS_MLP_Conv
from module.neuron import NeuronFactory, make_neuron
from module.sps import MS_SPS

Hook = dict[str, Tensor]


class SpikeDrivenTransformer(nn.Module):
    """Spiking patch splitting, `depths` blocks of spike-driven self-attention and MLP, a linear head.

    Between layers only spikes (0 or 1) travel; shortcuts carry membrane values. The defaults are the published
    8-512 model for ImageNet. `module.accelerate.accelerate` makes it faster; nothing in here does.

    Args:
        img_size: pixels, one number or (height, width); only checked (before the head all is convolution).
        in_channels: C; 2 for event frames.
        num_classes: K; 0 leaves out the head (the outputs are its spikes, averaged over T).
        embed_dims: D, a multiple of 8 and of `num_heads`.
        mlp_ratios: hidden width of the MLP divided by D.
        T: how often a static image is shown. Event data brings its own T.
        pooling_stat: see `module.sps.MS_SPS`.
        dvs_mode: event mode of the attention.
        TET: keep the logits of each time step, `[T, B, K]`, for the TET loss.
        data_T: whether 5-D inputs may have another number of time steps than `T` (they are taken as they are).
        neuron: makes a layer of neurons, `[T, B, *]` -> `[T, B, *]`; see `module.neuron.make_neuron`.
        sps_layer: called as `sps_layer(in_channels, embed_dims, pooling_stat, neuron=neuron)`.
        block_layer: called as `module.block.MS_Block_Conv` is, and so are its `attn_layer` and `mlp_layer`.

    Raises:
        ValueError: at construction, for sizes that do not fit; each message has the bad value and the valid ones.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: int = 512,
        num_heads: int = 8,
        mlp_ratios: float = 4,
        depths: int = 8,
        T: int = 4,
        pooling_stat: str = "1111",
        *,
        dvs_mode: bool = False,
        TET: bool = False,
        data_T: bool = True,
        neuron: NeuronFactory = make_neuron,
        sps_layer: Callable[..., nn.Module] = MS_SPS,
        block_layer: Callable[..., nn.Module] = MS_Block_Conv,
        attn_layer: Callable[..., nn.Module] = MS_SSA_Conv,
        mlp_layer: Callable[..., nn.Module] = MS_MLP_Conv,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("T", T, 1),
            ("depths", depths, 1),
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.T = T
        self.data_T = data_T
        self.TET = TET
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.embed_dims = self.num_features = embed_dims
        self.depths = depths
        self.num_heads = num_heads
        self.mlp_ratios = mlp_ratios
        self.pooling_stat = pooling_stat
        self.grad_checkpointing = False

        self.patch_embed = sps_layer(in_channels, embed_dims, pooling_stat, neuron=neuron)
        self._check_size(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.block = nn.ModuleList(
            block_layer(
                embed_dims,
                num_heads,
                mlp_ratios,
                dvs_mode=dvs_mode,
                neuron=neuron,
                attn_layer=attn_layer,
                mlp_layer=mlp_layer,
            )
            for _ in range(depths)
        )
        self.head_lif = neuron()
        self.head: nn.Module = nn.Linear(embed_dims, num_classes) if num_classes else nn.Identity()
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _check_size(self, height: int, width: int) -> None:
        factor = 2 ** self.pooling_stat.count("1")
        for side, value in (("height", height), ("width", width)):
            if value < factor or value % factor:
                raise ValueError(
                    f"image {side} {value} must be a positive multiple of {factor}: pooling_stat={self.pooling_stat!r} "
                    f"halves it {self.pooling_stat.count('1')} times"
                )

    def _to_time_first(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` or event frames `[B, T, C, H, W]` -> `[T, B, C, H, W]`."""
        if x.dim() not in (4, 5):
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.dim()} dimensions; expected images [B, C, H, W] "
                "or event frames [B, T, C, H, W]"
            )
        if x.shape[-3] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.shape[-3]} channels, the model in_channels={self.in_channels}"
            )
        self._check_size(*x.shape[-2:])
        if x.dim() == 4:
            return x.unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        if x.shape[1] != self.T and not self.data_T:
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.shape[1]} time steps, the model T={self.T}; "
                "build the model with that T, or with data_T=True to take T from the data"
            )
        return x.transpose(0, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or event frames -> membrane values averaged over space, `[T, B, D]`."""
        x = self.patch_embed(self._to_time_first(x))
        for block in self.block:
            x = run_again_in_backward(block, x) if self._checkpoints_blocks() else block(x)
        return x.mean(dim=(3, 4))

    def _checkpoints_blocks(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass and compute the block again there: less memory,
        one more forward pass of the blocks, the same gradients. (The name is timm's.)"""
        self.grad_checkpointing = enable

    def fuse(self) -> SpikeDrivenTransformer:
        """Fold every BatchNorm of the published parts into the convolution before it, in place; returns the model.

        The model computes the same with fewer operations and can no longer be trained; its state dict has other
        keys than a checkpoint's, so load weights first.

        Raises:
            ValueError: in training mode; call `eval()` first.
        """
        fold_batchnorm(self)
        return self

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes (0: none), as timm's models have it."""
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.embed_dims, num_classes).to(next(self.parameters())) if num_classes else nn.Identity()
        )

    def forward_head(self, x: Tensor) -> Tensor:
        """Membrane values `[T, B, D]` -> logits `[B, K]`, or `[T, B, K]` with TET."""
        x = self.head(self.head_lif(x))
        return x if self.TET else x.mean(dim=0)

    def forward(self, x: Tensor, hook: Hook | None = None) -> tuple[Tensor, Hook | None]:
        """Logits, and the spike tensors if asked for.

        Args:
            x: images `[B, C, H, W]` or event frames `[B, T, C, H, W]`.
            hook: a dictionary to fill with every spike tensor, detached, `[T, B, ...]`, under its published name.

        Returns:
            logits `[B, K]` (`[T, B, K]` with TET), and `hook`.

        Raises:
            ValueError: wrong number of dimensions, channels or time steps, or a size the pooling does not divide.
        """
        if hook is None:
            return self.forward_head(self.forward_features(x)), None

        def recorder(name: str) -> Any:
            return lambda module, args, output: hook.update({name: output.detach()})

        handles = [m.register_forward_hook(recorder(name)) for name, m in self.spike_sources().items()]
        try:
            return self.forward_head(self.forward_features(x)), hook
        finally:
            for handle in handles:
                handle.remove()

    def spike_sources(self) -> dict[str, nn.Module]:
        """Published hook name -> the submodule whose output is that spike tensor, in order of computation.

        Measurements attach forward hooks to these; the forward pass itself knows nothing of them. A part without
        `spike_sources` of its own gives its neurons.
        """
        sources = spike_sources_of(self.patch_embed, "MS_SPS")
        for i, block in enumerate(self.block):
            sources |= (
                block.spike_sources(i) if isinstance(block, MS_Block_Conv) else spike_sources_of(block, f"block{i}")
            )
        sources["head_lif"] = self.head_lif
        return sources

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's optimizer factory asks for it: nothing beyond biases and 1-D tensors is exempt."""
        return set()


# Published training scripts pass these; they never had an effect on the published forward pass and have none here.
_WITHOUT_EFFECT = ("patch_size", "drop_rate", "drop_path_rate", "drop_block_rate")
# timm's factory may add these for any model; they describe downloads, of which there are none.
_OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
# Arguments of `make_neuron`.
_OF_NEURONS = ("spike_mode", "surrogate", "surrogate_alpha", "neuron_dtype", "neuron_args")


def sdt_arguments(
    *,
    img_size_h: int | None = None,
    img_size_w: int | None = None,
    qkv_bias: bool = False,
    sr_ratios: int = 1,
    **given: Any,
) -> dict[str, Any]:
    """The arguments of `SpikeDrivenTransformer` for those of `sdt`, which takes the published scripts' names too."""
    for name, value, neutral in (("qkv_bias", qkv_bias, False), ("sr_ratios", sr_ratios, 1)):
        if value != neutral:
            warnings.warn(f"{name}={value} has no effect on this model", stacklevel=3)
    arguments = {name: value for name, value in given.items() if name not in (*_WITHOUT_EFFECT, *_OF_TIMM)}
    if img_size_h is not None or img_size_w is not None:
        size = arguments.get("img_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        arguments["img_size"] = (
            height if img_size_h is None else img_size_h,
            width if img_size_w is None else img_size_w,
        )
    neuron = {name: arguments.pop(name) for name in _OF_NEURONS if name in arguments}
    if neuron:
        make = functools.partial(arguments.get("neuron", make_neuron), **neuron)
        make()  # a wrong name or argument is told before any layer is built
        arguments["neuron"] = make
    return arguments


@register_model
def sdt(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """The general entry: any size by arguments, see `SpikeDrivenTransformer`. Defaults: 8-512.

    Args:
        spike_mode, surrogate, surrogate_alpha, neuron_dtype, neuron_args: see `module.neuron.make_neuron`.
        img_size_h, img_size_w: the published names of `img_size`.
        patch_size, drop_rate, drop_path_rate, drop_block_rate: accepted without effect, as in the published model.
        qkv_bias, sr_ratios: likewise, and a value other than the default warns.
    """
    if pretrained:
        raise ValueError(
            "pretrained=True: no weights come with this project. The authors' checkpoints are linked from "
            "github.com/BICLab/Spike-Driven-Transformer; load one with `--resume FILE` or `--initial-checkpoint "
            "FILE`, or in Python with utils.run.checkpoint.load_weights(model, FILE)"
        )
    return SpikeDrivenTransformer(**sdt_arguments(**kwargs))


def _register(name: str, comment: str, **sizes: Any) -> None:
    """An entry of timm's registry that is `sdt` with these sizes; other arguments as there."""

    def entry(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
        return sdt(pretrained=pretrained, **(sizes | kwargs))

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = comment
    globals()[name] = register_model(entry)


# Paper, table 1: ImageNet at 224 x 224.
for _depths, _dim, _parameters in ((8, 384, 16.8), (6, 512, 23.4), (8, 512, 29.7), (10, 512, 36.0), (8, 768, 66.3)):
    _register(
        f"sdt_{_depths}_{_dim}",
        f"{_depths} blocks, D = {_dim}, for ImageNet ({_parameters} M parameters).",
        depths=_depths,
        embed_dims=_dim,
    )
# Published configurations: CIFAR-10 at 32 x 32.
for _dim, _parameters in ((256, 2.6), (512, 10.2)):
    _register(
        f"sdt_2_{_dim}",
        f"2 blocks, D = {_dim}, for CIFAR-10 ({_parameters} M parameters).",
        depths=2,
        embed_dims=_dim,
        img_size=32,
        num_classes=10,
        pooling_stat="0011",
    )
