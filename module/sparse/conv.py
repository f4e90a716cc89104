"""Event-driven layers inside an ordinary model, for training and evaluation on a CPU.

The layers replace `nn.Conv2d` one for one: same parameters, same state-dict keys, same place for hooks. What follows
them (BatchNorm, neurons) stays as it is. `module.sparse.inference` goes further, for evaluation only.

Legend: T time steps, B batch, C input and M output channels, H x W feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from module.kernels.conv_geometry import same_size_kernel
from module.kernels.native import NativeError
from module.sparse.library import load
from module.sparse.ops import KERNELS, OUTPUT_DTYPES, SPIKE_DTYPES, event_conv2d

ENGINES = ("auto", "dense", "event")


class EventConv2d(nn.Conv2d):
    """A 1x1 or 3x3 convolution that adds the weight rows of its active inputs.

    On another device than the CPU, in float64, and for values other than 0 and 1 it is the plain convolution.

    Attributes:
        auto: dense above the firing rate where that is faster here; otherwise event-driven at any rate.
        bf16_input_grad: compute the gradient of the input in bfloat16, all else in float32.
        counts: int64 `[spikes, additions]` of the last forward pass outside `torch.compile`; see `event_conv2d`.
    """

    auto: bool = True
    bf16_input_grad: bool = False
    counts: Tensor | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, *, auto: bool, bf16_input_grad: bool) -> EventConv2d:
        """The same convolution with the same parameters."""
        with torch.device("meta"):
            layer = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                padding=conv.padding,  # type: ignore[arg-type]
                bias=conv.bias is not None,
            )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.train(conv.training)
        layer.auto, layer.bf16_input_grad = auto, bf16_input_grad
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This layer's way of computing `x` with other parameters, as the joined ones of several layers."""
        out_dtype = x.dtype if x.is_floating_point() else torch.float32
        if torch.is_autocast_enabled("cpu"):
            out_dtype = torch.get_autocast_dtype("cpu")
        if x.device.type != "cpu" or x.dtype not in SPIKE_DTYPES or out_dtype not in OUTPUT_DTYPES:
            return self._conv_forward(x, weight, bias)
        out, counts = event_conv2d(
            x, weight, bias, out_dtype=out_dtype, auto=self.auto, bf16_input_grad=self.bf16_input_grad
        )
        if not torch.compiler.is_compiling():
            self.counts = counts
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, auto={self.auto}, bf16_input_grad={self.bf16_input_grad}"


def use_engine(
    model: nn.Module, engine: str, *, skip: tuple[str, ...] = (), bf16_input_grad: bool = False
) -> str | None:
    """Replace the convolutions of `model` that the kernels know, in place.

    Args:
        engine: `auto` (dense or event-driven per layer and call, whichever is faster), `event`, or `dense` (nothing
            is replaced).
        skip: names of layers whose input is no spikes.

    Returns:
        None, or the reason why the model stays dense though it was to be event-driven.

    Raises:
        ValueError: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "dense":
        return None
    try:
        load()
    except NativeError as error:
        return str(error)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and name not in skip and same_size_kernel(layer) in KERNELS:
            parent, _, attribute = name.rpartition(".")
            event = EventConv2d.of(layer, auto=engine == "auto", bf16_input_grad=bf16_input_grad)
            setattr(model.get_submodule(parent), attribute, event)
    return None
