"""The Spike-driven Transformer (Yao et al., NeurIPS 2023, arXiv 2307.01694), and timm's entries of it and of V2.

V2 itself is in module/v2/.

Legend: T time steps, B batch, C channels, H x W image, D embed_dims, K classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import load_pretrained, register_model
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv, spike_sources_of
from module.folding import fold_batchnorm
from module.mlp import MS_MLP_Conv
from module.network import SpikingNetwork, check_least
from module.neuron import NeuronFactory, make_neuron
from module.sps import MS_SPS
from module.v2.network import MetaSpikeFormer

__all__ = ["MetaSpikeFormer", "SpikeDrivenTransformer", "sdt", "sdt_arguments", "sdt_v2", "sdt_v2_arguments"]


class SpikeDrivenTransformer(SpikingNetwork):
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
        super().__init__(in_channels=in_channels, T=T, TET=TET, data_T=data_T)
        check_least(depths=(depths, 1), num_classes=(num_classes, 0))
        self.num_classes = num_classes
        self.embed_dims = self.num_features = embed_dims
        self.depths = depths
        self.num_heads = num_heads
        self.mlp_ratios = mlp_ratios
        self.pooling_stat = pooling_stat

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

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or event frames -> membrane values averaged over space, `[T, B, D]`."""
        x = self.patch_embed(self._to_time_first(x))
        for block in self.block:
            x = self._run_block(block, x)
        return x.mean(dim=(3, 4))

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


# Published training scripts pass these; they never had an effect on the published forward pass and have none here.
_WITHOUT_EFFECT = ("patch_size", "drop_rate", "drop_path_rate", "drop_block_rate")
# timm's factory may add these for any model; they say where weights are (`_with_weights`).
_OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
# Arguments of `make_neuron`.
_OF_NEURONS = ("spike_mode", "surrogate", "surrogate_alpha", "neuron_dtype", "neuron_args")


def sdt_arguments(**given: Any) -> dict[str, Any]:
    """The arguments of `SpikeDrivenTransformer` for those of `sdt`, which takes the published scripts' names too."""
    # It has one head: distillation acts on that.
    given.pop("kd", None)
    return _arguments(given, ignored={})


def sdt_v2_arguments(**given: Any) -> dict[str, Any]:
    """The arguments of `MetaSpikeFormer` for those of `sdt_v2`, which takes the published scripts' names too."""
    return _arguments(given, ignored={"dvs_mode": False, "pooling_stat": None})


def _arguments(given: dict[str, Any], ignored: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that have an effect, for a class of network.

    Args:
        ignored: name -> neutral value of what this class has no use for; another value warns.
    """
    ignored = ignored | {"qkv_bias": False, "sr_ratios": 1}
    for name, neutral in ignored.items():
        if given.get(name, neutral) != neutral:
            warnings.warn(f"{name}={given[name]} has no effect on this model", stacklevel=4)
    dropped = (*_WITHOUT_EFFECT, *_OF_TIMM, *ignored, "img_size_h", "img_size_w")
    arguments = {name: value for name, value in given.items() if name not in dropped}
    sides = [given.get("img_size_h"), given.get("img_size_w")]
    if sides != [None, None]:
        size = given.get("img_size", 224)
        sizes = (size, size) if isinstance(size, int) else size
        height, width = (usual if side is None else side for side, usual in zip(sides, sizes, strict=True))
        arguments["img_size"] = (height, width)
    neuron = {name: arguments.pop(name) for name in _OF_NEURONS if name in arguments}
    if neuron:
        make = functools.partial(arguments.get("neuron", make_neuron), **neuron)
        make()  # a wrong name or argument is told before any layer is built
        arguments["neuron"] = make
    return arguments


_Network = TypeVar("_Network", bound=nn.Module)


def _with_weights(model: _Network, pretrained: bool, given: dict[str, Any], repository: str) -> _Network:
    """`model`, with the weights that timm found for it: those of a `local-dir:` or `hf-hub:` name."""
    if not pretrained:
        return model
    source = given.get("pretrained_cfg")
    source = source if isinstance(source, dict) or source is None else source.to_dict()
    if not source or not any(source.get(key) for key in ("file", "hf_hub_id", "url", "state_dict")):
        raise ValueError(
            "pretrained=True: no weights come with this project. The authors' checkpoints are linked from "
            f"github.com/BICLab/{repository}; load one with `--resume FILE` or `--initial-checkpoint "
            "FILE`, or in Python with utils.run.checkpoint.load_weights(model, FILE). A folder made by `python -m "
            'utils.export CHECKPOINT --to hub` loads as timm.create_model("local-dir:FOLDER", pretrained=True)'
        )
    classes = getattr(model, "num_classes", 0)
    load_pretrained(model, pretrained_cfg=source, num_classes=classes, in_chans=source["input_size"][0])
    return model


@register_model
def sdt(pretrained: bool = False, **kwargs: Any) -> SpikeDrivenTransformer:
    """The general entry: any size by arguments, see `SpikeDrivenTransformer`. Defaults: 8-512.

    Args:
        spike_mode, surrogate, surrogate_alpha, neuron_dtype, neuron_args: see `module.neuron.make_neuron`.
        img_size_h, img_size_w: the published names of `img_size`.
        patch_size, drop_rate, drop_path_rate, drop_block_rate: accepted without effect, as in the published model.
        qkv_bias, sr_ratios: likewise, and a value other than the default warns.
        kd: accepted without effect; for distillation, V2 has a second head, and this model has not.
    """
    network = SpikeDrivenTransformer(**sdt_arguments(**kwargs))
    return _with_weights(network, pretrained, kwargs, "Spike-Driven-Transformer")


@register_model
def sdt_v2(pretrained: bool = False, **kwargs: Any) -> MetaSpikeFormer:
    """Spike-driven Transformer V2: any size by arguments, see `MetaSpikeFormer`. Defaults: 55M, T = 1.

    Args:
        spike_mode, surrogate, surrogate_alpha, neuron_dtype, neuron_args: see `module.neuron.make_neuron`.
        img_size_h, img_size_w: the published names of `img_size`.
        patch_size, drop_rate, drop_path_rate, drop_block_rate: accepted without effect, as in the published model.
        qkv_bias, sr_ratios, dvs_mode, pooling_stat: likewise, and a value other than the default warns.
    """
    network = MetaSpikeFormer(**sdt_v2_arguments(**kwargs))
    return _with_weights(network, pretrained, kwargs, "Spike-Driven-Transformer-V2")


def _register(name: str, comment: str, build: Callable[..., nn.Module] = sdt, **sizes: Any) -> None:
    """An entry of timm's registry that is `build` with these sizes; other arguments as there."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(pretrained=pretrained, **(sizes | kwargs))

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
# V2, ImageNet at 224 x 224: by parameters, and under the published functions' names, which count D3 and 6 + 2 blocks.
for _name, _published, _dims in (
    ("sdt_v2_15m", None, (64, 128, 256, 360)),
    ("sdt_v2_31m", "metaspikformer_8_384", (96, 192, 384, 480)),
    ("sdt_v2_55m", "metaspikformer_8_512", (128, 256, 512, 640)),
    ("sdt_v2_124m", "metaspikformer_8_768", (192, 384, 768, 960)),
):
    for _entry in (_name, _published):
        if _entry:
            _register(_entry, f"V2 with channels {_dims}, for ImageNet.", build=sdt_v2, embed_dims=_dims)
