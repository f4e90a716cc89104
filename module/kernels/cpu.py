"""The compiled CPU kernels of module/kernels/csrc behind functions on tensors.

Tensors are `[T, B, C, *]` (any `[T, *]` for the neuron alone) with time outermost and no gaps; all tensors of a call
have the same strides. The callers (module/kernels/lif.py and its neighbours) see to that.

Legend: T time steps (a first dimension of 1 stands for an input that is the same at each of `steps` steps), B batch,
C channels, D channels of the attention, N tokens.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from module.kernels import native
from module.kernels.substitute import plain_class

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SOURCES = ("neuron.cpp", "batchnorm.cpp", "attention.cpp", "pool.cpp", "winograd.cpp", "depthwise.cpp", "bits.cpp")
LIBRARY = native.Library(
    name="cpu",
    sources=_SOURCES,
    flags=("-fno-math-errno", "-fno-trapping-math"),  # rounding and comparing in vectors
)

_i64, _f64, _pointer, _int = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "lif_forward": [_i64, _i64, _pointer, _i64, _pointer, _f64, _f64],
    "lif_backward": [_i64, _i64, _pointer, _i64, _pointer, _pointer, _f64, _f64, _f64, _pointer],
    "affine_lif_forward": [*[_i64] * 4, _pointer, _i64, *[_pointer] * 3, _f64, _f64],
    "affine_lif_backward": [*[_i64] * 4, _pointer, _i64, *[_pointer] * 5, *[_f64] * 3, *[_pointer] * 3],
    "statistics": [_i64, _i64, _i64, *[_pointer] * 3],
    "affine": [_i64, _i64, _i64, *[_pointer] * 5],
    "gradient_sums": [_i64, _i64, _i64, *[_pointer] * 5],
    "gradient_apply": [_i64, _i64, _i64, *[_pointer] * 7],
    "attend": [*[_i64] * 4, *[_pointer] * 3, _f64, _f64],
    "attend_backward": [*[_i64] * 4, *[_pointer] * 4, *[_f64] * 3, _pointer],
    "max_pool": [*[_i64] * 4, *[_pointer] * 3],
    "max_pool_backward": [*[_i64] * 4, *[_pointer] * 3],
    "depthwise": [*[_i64] * 5, *[_pointer] * 6],
    "depthwise_weight_gradient": [*[_i64] * 5, *[_pointer] * 6],
    "pack_bits": [_i64, _pointer, _pointer],
    "unpack_bits": [_i64, _pointer, _pointer],
    "winograd_to_tiles": [*[_i64] * 4, _pointer, _i64, _i64, _pointer],
    "winograd_gradient_to_tiles": [*[_i64] * 4, _pointer, _i64, _i64, _pointer],
    "winograd_from_tiles": [*[_i64] * 4, _pointer, _i64, _i64, _pointer],
}


@functools.cache
def why_unusable() -> str | None:
    """None, or the reason why there are no compiled kernels on this machine (asked once per process)."""
    try:
        native.load(LIBRARY)
    except native.NativeError as error:
        return str(error)
    return None


@torch.compiler.assume_constant_result
def _are_built() -> bool:
    return why_unusable() is None


def usable(x: Tensor) -> bool:
    """Whether the kernels can compute `x`."""
    return x.device.type == "cpu" and x.dtype in DTYPES and _are_built()


def same_size_kernel(conv: nn.Module) -> int | None:
    """k of a plain k x k convolution, k odd, that keeps the size of the map (stride 1, zeros around); else None."""
    if plain_class(conv) is not nn.Conv2d:
        return None
    assert isinstance(conv, nn.Conv2d)
    if (conv.groups, conv.padding_mode) != (1, "zeros"):
        return None
    k = conv.kernel_size[0]
    expected = ((k, k), (1, 1), (k // 2, k // 2), (1, 1))
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return k if k % 2 and found == expected else None


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(native.load(LIBRARY), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [*_SIGNATURES[name], _int]
    function.restype = None
    return function


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _function(name, dtype)(*values, torch.get_num_threads())


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inner_size(x: Tensor) -> int:
    """Elements between two neighbours in dimension 2 (channels): 1 for channels-last, H * W otherwise."""
    return 1 if x.shape[2] == 1 and x.stride(2) != 1 and x[0, 0, 0].numel() == 1 else x.stride(2)


def _sizes(x: Tensor, steps: int) -> tuple[int, int, int]:
    """T, elements per step, and how far apart two steps of the input are."""
    per_step = x.numel() // x.shape[0]
    return steps, per_step, per_step if x.shape[0] == steps else 0


def lif_forward(x: Tensor, spikes: Tensor, decay: float, threshold: float) -> None:
    T, N, distance = _sizes(x, spikes.shape[0])
    _call("lif_forward", x.dtype, T, N, x, distance, spikes, decay, threshold)


def lif_backward(
    g: Tensor, x: Tensor, gx: Tensor, decay: float, threshold: float, alpha: float, want_decay: bool
) -> float:
    """Fills `gx`; returns the gradient of the decay, 0 if unwanted."""
    T, N, distance = _sizes(x, g.shape[0])
    g_decay = torch.zeros((), dtype=torch.float64)
    _call("lif_backward", x.dtype, T, N, x, distance, g, gx, decay, threshold, alpha, g_decay if want_decay else 0)
    return float(g_decay)


def affine_lif_forward(x: Tensor, scale: Tensor, shift: Tensor, spikes: Tensor, decay: float, threshold: float) -> None:
    T, N, distance = _sizes(x, spikes.shape[0])
    layout = (T, N, x.shape[2], inner_size(x))
    _call("affine_lif_forward", x.dtype, *layout, x, distance, scale, shift, spikes, decay, threshold)


def affine_lif_backward(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    gx: Tensor,
    decay: float,
    threshold: float,
    alpha: float,
    want_decay: bool,
) -> tuple[Tensor, Tensor, float]:
    """Fills `gx` with the gradient of `x * scale + shift`; returns its sums per channel, plain and times
    `x - center`, in float64, and the gradient of the decay."""
    T, N, distance = _sizes(x, g.shape[0])
    sums = torch.zeros(2, x.shape[2], dtype=torch.float64)
    g_decay = torch.zeros((), dtype=torch.float64)
    layout = (T, N, x.shape[2], inner_size(x))
    tensors = (scale, shift, center, g, gx)
    out = (g_decay if want_decay else 0, sums[0], sums[1])
    _call("affine_lif_backward", x.dtype, *layout, x, distance, *tensors, decay, threshold, alpha, *out)
    return sums[0], sums[1], float(g_decay)


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel (dimension 2) over all others, the variance without Bessel's correction, in float64."""
    C, inner = x.shape[2], inner_size(x)
    sums = torch.zeros(2, C, dtype=torch.float64)
    _call("statistics", x.dtype, x.numel() // (C * inner), C, inner, x, sums[0], sums[1])
    return sums[0], sums[1] / (x.numel() // C)


def affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """`out = x * scale + shift (+ residual)`, per channel; `out` may be `residual`."""
    added = 0 if residual is None else residual
    _call("affine", x.dtype, x.numel(), x.shape[2], inner_size(x), x, scale, shift, added, out)


def gradient_sums(g: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sums per channel of `g` and of `g * (x - center)`, in float64."""
    sums = torch.zeros(2, x.shape[2], dtype=torch.float64)
    _call("gradient_sums", x.dtype, x.numel(), x.shape[2], inner_size(x), x, g, center, sums[0], sums[1])
    return sums[0], sums[1]


def gradient_apply(g: Tensor, x: Tensor, center: Tensor, p: Tensor, q: Tensor, r: Tensor, gx: Tensor) -> None:
    """`gx = p * g + q * (x - center) + r`, per channel; `gx` may be `g`."""
    _call("gradient_apply", x.dtype, x.numel(), x.shape[2], inner_size(x), x, g, center, p, q, r, gx)


def _attention_sizes(qkv: Tensor) -> tuple[int, int, int, int]:
    T, B, channels, H, W = qkv.shape
    return T, B, H * W, channels // 3


def attend(qkv: Tensor, kv: Tensor, y: Tensor, decay: float, threshold: float) -> None:
    _call("attend", qkv.dtype, *_attention_sizes(qkv), qkv, kv, y, decay, threshold)


def attend_backward(
    g: Tensor, qkv: Tensor, kv: Tensor, gqkv: Tensor, decay: float, threshold: float, alpha: float
) -> float:
    """Fills `gqkv`; returns the gradient of the decay."""
    g_decay = torch.zeros((), dtype=torch.float64)
    _call("attend_backward", qkv.dtype, *_attention_sizes(qkv), qkv, kv, g, gqkv, decay, threshold, alpha, g_decay)
    return float(g_decay)


def max_pool(x: Tensor, out: Tensor, winner: Tensor | None) -> None:
    """Fills `out` and, if given, `winner` (uint8) from `x` `[N, C, H, W]`, all with channels innermost."""
    N, C, H, W = x.shape
    _call("max_pool", x.dtype, N, H, W, C, x, out, 0 if winner is None else winner)


def max_pool_backward(g: Tensor, winner: Tensor, gx: Tensor) -> None:
    """Fills `gx` `[N, C, H, W]`."""
    N, C, H, W = gx.shape
    _call("max_pool_backward", g.dtype, N, H, W, C, g, winner, gx)


Affine = tuple[Tensor, Tensor, Tensor]  # scale, shift and border, each [C] in the state's dtype


def _depthwise_arguments(x: Tensor, kernel: int, affine: Affine | None) -> tuple[Any, ...]:
    N, C, H, W = x.shape
    return (N, H, W, C, kernel, x, *(affine or (0, 0, 0)))


def depthwise(x: Tensor, affine: Affine | None, weight: Tensor, out: Tensor) -> None:
    """Fills `out` `[N, C, H, W]` from `x` `[N, C, H, W]`, both with channels innermost, and `weight` `[k * k, C]` in
    the state's dtype, k 3 or 7. With `affine`, `x` is scaled and shifted, with the border around it; else zeros."""
    kernel = round(len(weight) ** 0.5)
    _call("depthwise", x.dtype, *_depthwise_arguments(x, kernel, affine), weight, out)


def depthwise_weight_gradient(x: Tensor, affine: Affine | None, g: Tensor, kernel: int) -> Tensor:
    """`[k * k, C]` in float64, from the gradient `g` of the result."""
    sums = torch.zeros(kernel * kernel, x.shape[1], dtype=torch.float64)
    _call("depthwise_weight_gradient", x.dtype, *_depthwise_arguments(x, kernel, affine), g, sums)
    return sums


def pack_bits(x: Tensor) -> Tensor:
    """Which values of the dense `x` are not 0, in the order of memory, as uint8 `[ceil(n / 8)]`."""
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    _call("pack_bits", x.dtype, x.numel(), x, bits)
    return bits


def unpack_bits(bits: Tensor, out: Tensor) -> None:
    """Fills the dense `out` with 0 and 1."""
    _call("unpack_bits", out.dtype, out.numel(), bits, out)


def winograd_to_tiles(x: Tensor, first: int, tiles: Tensor) -> None:
    """Fills `tiles` `[36, count, C]` from `x` `[N, C, H, W]` with channels innermost, from tile `first` on; float32."""
    N, C, H, W = x.shape
    _call("winograd_to_tiles", x.dtype, N, H, W, C, x, first, tiles.shape[1], tiles)


def winograd_gradient_to_tiles(g: Tensor, first: int, tiles: Tensor) -> None:
    """As `winograd_to_tiles` for the gradient `g` of a result."""
    N, M, H, W = g.shape
    _call("winograd_gradient_to_tiles", g.dtype, N, H, W, M, g, first, tiles.shape[1], tiles)


def winograd_from_tiles(products: Tensor, first: int, out: Tensor) -> None:
    """Fills those tiles of `out` `[N, C, H, W]` with channels innermost from `products` `[36, count, C]`; float32."""
    N, C, H, W = out.shape
    _call("winograd_from_tiles", out.dtype, N, H, W, C, products, first, products.shape[1], out)
