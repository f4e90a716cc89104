"""Spike-driven Transformer V2, "Meta-SpikeFormer" (Yao et al., ICLR 2024, arXiv 2404.03663).

Legend: T time steps, B batch, C channels, H x W image, D1..D4 widths of the stages, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from module.folding import fold_batchnorm
from module.network import SpikingNetwork, check_least
from module.neuron import NeuronFactory, make_neuron, neurons_of
from module.v2.attention import Attention
from module.v2.block import TransformerBlock
from module.v2.conv import ConvBlock, DownSampling
from module.v2.merging import merge_convolutions
from module.v2.mlp import MLP


class MetaSpikeFormer(SpikingNetwork):
    """Four convolutional blocks, then Transformer blocks in two stages at 1/16 of the image, and a linear head.

    Any image size works: a stage that halves n pixels gives ceil(n / 2). The defaults are the published 55M model.

    Args:
        img_size: accepted for the sake of other models; it decides nothing.
        in_channels: C; 2 for event frames (which have no published reference here).
        num_classes: K; 0 leaves out the head (the outputs are its spikes, averaged over T).
        embed_dims: D1, D2, D3, D4; D1 at least 2, D3 and D4 multiples of `num_heads`.
        num_heads: heads of the attention.
        mlp_ratios: hidden channels of conv blocks and MLPs, in units of theirs.
        depths: Transformer blocks of stage 3 and of stage 4.
        T: how often a static image is shown; no weight depends on it.
        kd: a second head for distillation. Training then returns the logits of both heads as a pair, evaluation
            their mean.
        TET: keep the logits of each time step, `[T, B, K]`, for the TET loss.
        data_T: whether 5-D inputs may have another number of time steps than `T`.
        neuron: makes a layer of neurons, `[T, B, *]` -> `[T, B, *]`; see `module.neuron.make_neuron`.
        downsample_layer, conv_layer, block_layer, attn_layer, mlp_layer: called as the classes that are their defaults.

    Raises:
        ValueError: at construction, for sizes that do not fit; each message has the bad value and the valid ones.
    """

    has_merged_form = True  # see `fuse`; measurements use it

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (128, 256, 512, 640),
        num_heads: int = 8,
        mlp_ratios: float = 4,
        depths: Sequence[int] = (6, 2),
        T: int = 1,
        *,
        kd: bool = False,
        TET: bool = False,
        data_T: bool = True,
        neuron: NeuronFactory = make_neuron,
        downsample_layer: Callable[..., nn.Module] = DownSampling,
        conv_layer: Callable[..., nn.Module] = ConvBlock,
        block_layer: Callable[..., nn.Module] = TransformerBlock,
        attn_layer: Callable[..., nn.Module] = Attention,
        mlp_layer: Callable[..., nn.Module] = MLP,
    ) -> None:
        super().__init__(in_channels=in_channels, T=T, TET=TET, data_T=data_T)
        check_least(num_classes=(num_classes, 0))
        _check_sizes(embed_dims, depths, num_heads, mlp_ratios)
        if kd and not num_classes:
            raise ValueError("kd=True needs classes for its second head, and num_classes=0 leaves the heads out")
        self.num_classes = num_classes
        self.embed_dims, self.depths = list(embed_dims), list(depths)
        self.num_features = embed_dims[3]
        self.num_heads = num_heads
        self.mlp_ratios = mlp_ratios
        self.kd = kd

        D1, D2, D3, D4 = embed_dims

        def down(c_in: int, c_out: int, kernel_size: int = 3, stride: int = 2, first: bool = False) -> nn.Module:
            return downsample_layer(c_in, c_out, kernel_size=kernel_size, stride=stride, first=first, neuron=neuron)

        def conv(channels: int) -> nn.ModuleList:
            return nn.ModuleList([conv_layer(channels, mlp_ratios, neuron=neuron)])

        def blocks(dim: int, depth: int) -> nn.ModuleList:
            layers = dict(neuron=neuron, attn_layer=attn_layer, mlp_layer=mlp_layer)
            return nn.ModuleList(block_layer(dim, num_heads, mlp_ratios, **layers) for _ in range(depth))

        self.downsample1_1 = down(in_channels, D1 // 2, kernel_size=7, first=True)
        self.ConvBlock1_1 = conv(D1 // 2)
        self.downsample1_2 = down(D1 // 2, D1)
        self.ConvBlock1_2 = conv(D1)
        self.downsample2 = down(D1, D2)
        self.ConvBlock2_1 = conv(D2)
        self.ConvBlock2_2 = conv(D2)
        self.downsample3 = down(D2, D3)
        self.block3 = blocks(D3, depths[0])
        self.downsample4 = down(D3, D4, stride=1)
        self.block4 = blocks(D4, depths[1])
        self.lif = neuron()
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """New heads for another number of classes (0: none), as timm's models have it."""
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = _linear(self.num_features, num_classes, like) if num_classes else nn.Identity()
        self.kd = self.kd and bool(num_classes)
        if self.kd:
            self.head_kd = _linear(self.num_features, num_classes, like)
        elif hasattr(self, "head_kd"):
            del self.head_kd

    def fuse(self) -> MetaSpikeFormer:
        """The merged form, in place: convolutions without a neuron between them become one, and every BatchNorm of the
        published parts is folded; see `module.v2.merging`. Returns the model.

        Only spikes then enter every convolution after the first one. The model can no longer be trained, and its state
        dict has other keys than a checkpoint's, so load weights first.

        Raises:
            ValueError: in training mode; call `eval()` first.
        """
        merge_convolutions(self)
        fold_batchnorm(self)
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or event frames -> membrane values averaged over space, `[T, B, D4]`."""
        x = self._to_time_first(x)
        for part in (
            *(self.downsample1_1, *self.ConvBlock1_1, self.downsample1_2, *self.ConvBlock1_2),
            *(self.downsample2, *self.ConvBlock2_1, *self.ConvBlock2_2, self.downsample3),
        ):
            x = part(x)
        for block in self.block3:
            x = self._run_block(block, x)
        x = self.downsample4(x)
        for block in self.block4:
            x = self._run_block(block, x)
        return x.mean(dim=(3, 4))

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Membrane values `[T, B, D4]` -> logits `[B, K]`, or `[T, B, K]` with TET; of both heads in training with
        `kd`."""
        s = self.lif(x)
        logits = self._over_steps(self.head(s))
        if not self.kd:
            return logits
        other = self._over_steps(self.head_kd(s))
        return (logits, other) if self.training else (logits + other) / 2

    def _over_steps(self, logits: Tensor) -> Tensor:
        return logits if self.TET else logits.mean(dim=0)

    def spike_sources(self) -> dict[str, nn.Module]:
        """Path of a neuron in the published state dict -> the neuron, in order of computation."""
        parts = {name: part for name, part in self.named_children() if name not in ("lif", "head", "head_kd")}
        sources = {f"{name}.{path}": n for name, part in parts.items() for path, n in neurons_of(part).items()}
        return sources | {"lif": self.lif}


def _linear(features: int, classes: int, like: Tensor) -> nn.Linear:
    layer = nn.Linear(features, classes, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _check_sizes(embed_dims: Sequence[int], depths: Sequence[int], num_heads: int, mlp_ratios: float) -> None:
    for name, values, count, what in (
        ("embed_dims", embed_dims, 4, "channels of the four stages, as [64, 128, 256, 360]"),
        ("depths", depths, 2, "Transformer blocks of stage 3 and of stage 4, as [6, 2]"),
    ):
        whole = isinstance(values, Sequence) and all(type(value) is int and value >= 1 for value in values)
        if not whole or len(values) != count:
            raise ValueError(f"{name}={values} must be {count} positive numbers: the {what}")
    if embed_dims[0] < 2:
        raise ValueError(f"embed_dims={list(embed_dims)}: the first stage starts with half of the first, so it is >= 2")
    if not isinstance(num_heads, int) or num_heads < 1 or any(dim % num_heads for dim in embed_dims[2:]):
        raise ValueError(f"num_heads={num_heads} must divide the last two of embed_dims={list(embed_dims)}")
    if min(embed_dims[0] // 2, *embed_dims) * mlp_ratios < 1:
        raise ValueError(f"mlp_ratios={mlp_ratios} leaves a layer no channel at embed_dims={list(embed_dims)}")
