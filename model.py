"""The Spike-driven Transformer (Yao et al., NeurIPS 2023, arXiv 2307.01694) and its entries in timm's registry.

Legend: T time steps, B batch, C channels, H x W image, D embed_dims, K classes.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from module.block import MS_Block_Conv
from module.folding import fold_batchnorm
from module.grad_checkpointing import run_again_in_backward
from module.neuron import check_neuron_settings, make_neuron
from module.sps import MS_SPS

Hook = dict[str, Tensor]

_logger = logging.getLogger("sdt")


class SpikeDrivenTransformer(nn.Module):
    """Spiking patch splitting, `depths` blocks of spike-driven self-attention and MLP, a linear head.

    Between layers only spikes (0 or 1) travel; shortcuts carry membrane values. The defaults are the published
    8-512 model for ImageNet.

    Args:
        img_size_h, img_size_w: pixels; only checked (the network is fully convolutional before the head).
        in_channels: C; 2 for event frames.
        num_classes: K; 0 leaves out the head (the outputs are its spikes, averaged over T).
        embed_dims: D, a multiple of 8 and of `num_heads`.
        mlp_ratios: hidden width of the MLP divided by D.
        T: how often a static image is shown. Event data brings its own T.
        pooling_stat: see `module.sps.MS_SPS`.
        spike_mode: `lif` or `plif`.
        dvs_mode: event mode of the attention.
        TET: keep the logits of each time step, `[T, B, K]`, for the TET loss.
        data_T: whether 5-D inputs may have another number of time steps than `T` (they are taken as they are).
        backend, neuron_dtype: see `module.neuron.make_neuron`.
        engine, bf16_input_grad: convolutions on a CPU, see `module.sparse.conv.use_engine`. Where the kernels cannot
            be built the model stays dense, and a warning says why.
        patch_size, drop_rate, drop_path_rate, drop_block_rate: accepted because published training scripts pass
            them; they never had an effect on the published forward pass and have none here.
        qkv_bias, sr_ratios: likewise, and a value other than the default warns.

    Raises:
        ValueError: at construction, for sizes or names that do not fit; each message has the bad value and the
            valid ones.
    """

    def __init__(
        self,
        img_size_h: int = 224,
        img_size_w: int = 224,
        patch_size: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: int = 512,
        num_heads: int = 8,
        mlp_ratios: float = 4,
        depths: int = 8,
        T: int = 4,
        pooling_stat: str = "1111",
        spike_mode: str = "lif",
        dvs_mode: bool = False,
        TET: bool = False,
        data_T: bool = True,
        backend: str = "auto",
        neuron_dtype: str = "float32",
        engine: str = "dense",
        bf16_input_grad: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float | None = None,
        qkv_bias: bool = False,
        sr_ratios: int = 1,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if pretrained:
            raise ValueError(
                "pretrained=True: no weights come with this project. The authors' checkpoints are linked from "
                "github.com/BICLab/Spike-Driven-Transformer; load one with `--resume FILE` or `--initial-checkpoint "
                "FILE`, or in Python with utils.run.checkpoint.load_weights(model, FILE)"
            )
        check_neuron_settings(spike_mode, backend, neuron_dtype)
        for name, value, least in (
            ("T", T, 1),
            ("depths", depths, 1),
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name, value, neutral in (("qkv_bias", qkv_bias, False), ("sr_ratios", sr_ratios, 1)):
            if value != neutral:
                warnings.warn(f"{name}={value} has no effect on this model", stacklevel=2)

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

        neuron: dict[str, Any] = dict(spike_mode=spike_mode, backend=backend, neuron_dtype=neuron_dtype)
        self.patch_embed = MS_SPS(in_channels, embed_dims, pooling_stat, **neuron)
        self._check_size(img_size_h, img_size_w)
        self.block = nn.ModuleList(
            MS_Block_Conv(embed_dims, num_heads, mlp_ratios, dvs_mode=dvs_mode, **neuron) for _ in range(depths)
        )
        self.head_lif = make_neuron(**neuron)
        self.head: nn.Module = nn.Linear(embed_dims, num_classes) if num_classes else nn.Identity()
        self.apply(self._init_weights)
        self.engine = engine
        if engine != "dense":
            self._use_engine(bf16_input_grad)

    def _use_engine(self, bf16_input_grad: bool) -> None:
        # Imported here: it registers operators, which a dense model has no use for.
        from module.sparse.conv import use_engine

        # The first convolution sees an image, which is no spikes.
        first = "patch_embed.proj_conv"
        if reason := use_engine(self, self.engine, skip=(first,), bf16_input_grad=bf16_input_grad):
            _logger.warning(f"warning: engine {self.engine} is not available, convolutions stay dense: {reason}")
            self.engine = "dense"

    def for_evaluation(self) -> nn.Module:
        """What evaluates these weights fastest: with an engine, `module.sparse.inference.EventInference` where it
        can run (float32 on a CPU), else this model. Called like the model; it does not follow later updates."""
        if self.engine == "dense":
            return self
        from module.sparse.inference import EventInference, why_not

        return self if why_not(self) else EventInference(self, auto=self.engine == "auto")

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
        """Fold every BatchNorm into the convolution before it, for evaluation; in place, and returned.

        The model computes the same with fewer operations and can no longer be trained; its state dict has other
        keys than a checkpoint's, so load weights first.

        Raises:
            ValueError: in training mode; call `eval()` first.
        """
        fold_batchnorm(self)
        return self

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

        Measurements attach forward hooks to these; the forward pass itself knows nothing of them.
        """
        sps = self.patch_embed
        sources: dict[str, nn.Module] = {
            "MS_SPS_lif": sps.proj_lif,
            "MS_SPS_lif1": sps.proj_lif1,
            "MS_SPS_lif2": sps.proj_lif2,
            "MS_SPS_lif3": sps.proj_lif3,
        }
        for i, block in enumerate(self.block):
            assert isinstance(block, MS_Block_Conv)
            sources |= block.attn.spike_sources(f"MS_SSA_Conv{i}")
            sources |= block.mlp.spike_sources(f"MS_MLP_Conv{i}")
        sources["head_lif"] = self.head_lif
        return sources

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's optimizer factory asks for it: nothing beyond biases and 1-D tensors is exempt."""
        return set()


@register_model
def sdt(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """The general entry: any size by arguments, see `SpikeDrivenTransformer`. Defaults: 8-512."""
    # timm's factory may add these for any model; they describe downloads, of which there are none.
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return SpikeDrivenTransformer(pretrained=pretrained, **kwargs)


# Sizes for ImageNet at 224 x 224: paper, table 1.
_IMAGENET = dict(img_size_h=224, img_size_w=224, num_classes=1000, pooling_stat="1111", T=4)
# Sizes for CIFAR-10 at 32 x 32: published configurations.
_CIFAR = dict(img_size_h=32, img_size_w=32, num_classes=10, pooling_stat="0011", T=4)


def _variant(pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SpikeDrivenTransformer:
    return sdt(pretrained=pretrained, **(defaults | kwargs))


@register_model
def sdt_8_384(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """8 blocks, D = 384, for ImageNet (16.8 M parameters)."""
    return _variant(pretrained, kwargs, depths=8, embed_dims=384, **_IMAGENET)


@register_model
def sdt_6_512(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """6 blocks, D = 512, for ImageNet (23.4 M parameters)."""
    return _variant(pretrained, kwargs, depths=6, embed_dims=512, **_IMAGENET)


@register_model
def sdt_8_512(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """8 blocks, D = 512, for ImageNet (29.7 M parameters)."""
    return _variant(pretrained, kwargs, depths=8, embed_dims=512, **_IMAGENET)


@register_model
def sdt_10_512(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """10 blocks, D = 512, for ImageNet (36.0 M parameters)."""
    return _variant(pretrained, kwargs, depths=10, embed_dims=512, **_IMAGENET)


@register_model
def sdt_8_768(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """8 blocks, D = 768, for ImageNet (66.3 M parameters)."""
    return _variant(pretrained, kwargs, depths=8, embed_dims=768, **_IMAGENET)


@register_model
def sdt_2_256(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """2 blocks, D = 256, for CIFAR-10 (2.6 M parameters); other sizes by arguments."""
    return _variant(pretrained, kwargs, depths=2, embed_dims=256, **_CIFAR)


@register_model
def sdt_2_512(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """2 blocks, D = 512, for CIFAR-10 (10.2 M parameters); other sizes by arguments."""
    return _variant(pretrained, kwargs, depths=2, embed_dims=512, **_CIFAR)
