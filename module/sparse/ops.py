"""Convolution of spikes by additions on a CPU, as torch operators.

`sparse_conv2d` sums the weight rows of the active inputs where its input is sparse enough for that to be faster. It is
a dense convolution where the input is not, or has other values than 0 and 1. For `torch.compile` each operator is one
node; they have gradients, and keep one bit per spike for the backward pass.

Legend: N images (time steps times batch), C input and M output channels, H x W feature map, P = N*H*W pixels,
words = ceil(C/64). Bits are int64 `[P, words]`, pixels in the order N, H, W.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from module.kernels import winograd
from module.sparse.crossover import crossover
from module.sparse.library import CONVOLVE, NONE, Layer, checked, load, run

# Of spikes, as module/kernels/csrc/sparse/sparse.h numbers them. Float64 is the reference's precision and stays dense.
SPIKE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.bool: 3}
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)
KERNELS = (1, 3)  # k of the k x k convolutions, stride 1, same size
NOT_SPIKES = -1


def pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def pack_spikes(x: Tensor) -> tuple[Tensor, int]:
    """Spikes `[N, C, H, W]`, any layout -> bits and the number of spikes, or NOT_SPIKES if a value is not 0 or 1."""
    N, C, H, W = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if not channels_last:
        x = x.contiguous()
    bits = torch.empty(N * H * W, (C + 63) // 64, dtype=torch.int64)
    threads = torch.get_num_threads()
    count = load().sparse_pack(
        pointer(x), SPIKE_DTYPES[x.dtype], int(channels_last), N, H * W, C, pointer(bits), threads
    )
    return bits, count


def unpack_spikes(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bits -> float32 spikes of `shape` `[N, C, H, W]`, channels-last."""
    x = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    load().sparse_unpack(pointer(bits), len(bits), shape[1], pointer(x), torch.get_num_threads())
    return x


def pack_weight(weight: Tensor) -> Tensor:
    """Weights `[M, C, k, k]` in the order the kernels read them, float32."""
    M, C, k, _ = weight.shape
    packed = torch.empty(-(-M // 32) * k * k * C * 32, dtype=torch.float32)
    dense = weight.detach().to(torch.float32, memory_format=torch.contiguous_format)
    load().sparse_pack_weights(pointer(dense), M, C, k * k, pointer(packed), torch.get_num_threads())
    return packed


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # The choice of precision was made outside; autocast must not make another one here.
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.to(dtype)
        out = F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=weight.shape[-1] // 2)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("sdt::event_conv2d", mutates_args=(), device_types="cpu")
def _sparse_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, auto: bool, bf16_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, C, H, W = x.shape
    M, k = weight.shape[0], weight.shape[-1]
    bits, count = pack_spikes(x)
    limit = crossover(C, M, k, N * H * W) if auto else 1.0
    if count == NOT_SPIKES:
        return _dense(x, weight, bias, out_dtype), bits.new_empty(0), torch.tensor([count, 0])
    if count > limit * x.numel():
        return _dense(x, weight, bias, out_dtype), bits, torch.tensor([count, 0])
    out = torch.empty((N, M, H, W), dtype=out_dtype, memory_format=torch.channels_last)
    packed, bias = pack_weight(weight), None if bias is None else bias.detach().float().contiguous()
    layer = Layer(kind=CONVOLVE, taps=k * k, dtype=SPIKE_DTYPES[out_dtype], results=1, T=1, N=N, H=H, W=W, C=C, O=M)
    layer.input, layer.source, layer.spikes = bits.data_ptr(), NONE, count
    layer.to[0].weights, layer.to[0].bias = packed.data_ptr(), None if bias is None else bias.data_ptr()
    layer.to[0].residual, layer.to[0].values, layer.to[0].spikes = NONE, out.data_ptr(), NONE
    (done,) = run(load(), (Layer * 1)(layer), None, torch.get_num_threads())
    return out, bits, torch.tensor([count, done.additions])


@_sparse_conv2d.register_fake
def _(x, weight, bias, out_dtype, auto, bf16_input_grad):  # type: ignore[no-untyped-def]
    N, C, H, W = x.shape
    out = torch.empty((N, weight.shape[0], H, W), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    bits = x.new_empty((N * H * W, (C + 63) // 64), dtype=torch.int64)
    return out, bits, x.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("sdt::event_weight_grad", mutates_args=(), device_types="cpu")
def sparse_weight_grad(bits: Tensor, grad: Tensor, channels: int, kernel: int) -> Tensor:
    """The weight gradient `[M, C, k, k]`, float32: rows of `grad` `[N, M, H, W]` summed over the active inputs."""
    N, M, H, W = grad.shape
    grad = grad.contiguous(memory_format=torch.channels_last)
    packed = torch.empty(-(-M // 32) * kernel**2 * channels * 32)
    threads = torch.get_num_threads()
    checked(
        load().sparse_weight_grad(
            *(pointer(bits), N, H, W, channels, M, kernel**2, pointer(grad)),
            *(SPIKE_DTYPES[grad.dtype], pointer(packed), threads),
        )
    )
    out = torch.empty(M, channels, kernel, kernel)
    load().sparse_unpack_weights(pointer(packed), M, channels, kernel**2, pointer(out), threads)
    return out


@sparse_weight_grad.register_fake
def _(bits, grad, channels, kernel):  # type: ignore[no-untyped-def]
    return grad.new_empty((grad.shape[1], channels, kernel, kernel), dtype=torch.float32)


def _input_grad(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense: a surrogate gradient reaches every input, fired or not."""
    grad, weight = grad.to(dtype), weight.to(dtype)
    if winograd.is_faster(weight, dtype):
        return winograd.input_grad(grad, weight)
    if weight.shape[-1] == 1:
        return (grad.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2)
    shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
    return conv2d_input(shape, weight.contiguous(memory_format=torch.channels_last), grad, padding=1)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _, _, ctx.bf16_input_grad = inputs
    _, bits, _ = output
    ctx.channels, ctx.x_dtype, ctx.has_bias = x.shape[1], x.dtype, bias is not None
    ctx.save_for_backward(bits, weight, x if bits.numel() == 0 and x.numel() else None)


def _backward(ctx, grad, grad_bits, grad_stats):  # type: ignore[no-untyped-def]
    bits, weight, x = ctx.saved_tensors
    kernel = weight.shape[-1]
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        dtype = torch.bfloat16 if ctx.bf16_input_grad else grad.dtype
        grad_x = _input_grad(grad, weight, dtype).to(ctx.x_dtype)
    if ctx.needs_input_grad[1]:
        if x is None:
            grad_weight = torch.ops.sdt.event_weight_grad(bits, grad, ctx.channels, kernel).to(weight.dtype)
        else:
            grad_weight = conv2d_weight(x.to(grad.dtype), weight.shape, grad, padding=kernel // 2)
            grad_weight = grad_weight.to(weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


_sparse_conv2d.register_autograd(_backward, setup_context=_setup_context)


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    auto: bool = True,
    bf16_input_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """`F.conv2d(x, weight, bias, padding=k // 2)` for spikes on a CPU, channels-last.

    Args:
        x: `[N, C, H, W]`, any layout; float32, bfloat16, float16, uint8 or bool.
        weight: `[M, C, k, k]`, k 1 or 3. Sums are float32 whatever its dtype.
        out_dtype: float32 or bfloat16.
        auto: compute densely above the firing rate at which that is faster on this machine (measured once and
            kept); otherwise sparse at any rate. Input other than 0 and 1 is computed densely in both cases.
        bf16_input_grad: compute the input gradient in bfloat16.

    Returns:
        `[N, M, H, W]`, and int64 `[spikes, additions]`: spikes in `x` (-1: it is not made of 0 and 1), and the
        additions of weights done (0: computed densely).

    Raises:
        NativeError: the kernels cannot be built here.
    """
    out, _, stats = torch.ops.sdt.event_conv2d(x, weight, bias, out_dtype, auto, bf16_input_grad)
    return out, stats


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: bool | torch.dtype) -> Tensor:
    """`F.linear(x, weight, bias)` for spikes `[*, C]` on a CPU; options as of `sparse_conv2d`."""
    pixels = x.reshape(-1, x.shape[-1], 1, 1)
    out, _ = sparse_conv2d(pixels, weight[:, :, None, None], bias, **options)  # type: ignore[arg-type]
    return out.reshape(*x.shape[:-1], len(weight))
