"""The merged form of V2, for evaluation and export: convolutions that follow each other without a neuron become one.

As trained, V2 is not spike-driven: real values enter each `pwconv2` and the inner layers of each RepConv. Merged, only
spikes enter every convolution after the first one. It computes the same with 2.3 times the multiply-accumulates: a
dense 7x7 convolution instead of a depthwise and a 1x1 one, and 9 C^2 weights instead of 2 C^2 + 9 C.

Weights are computed in float64 and rounded once. Legend: C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from module.folding import check_evaluation, folded, is_exactly
from module.v2.conv import SeparableConv
from module.v2.repconv import BorderedBatchNorm, RepConv


def merge_convolutions(model: nn.Module) -> None:
    """Merge each RepConv with the BatchNorm after it, and each depthwise 7x7 convolution with the 1x1 one after it.

    In place. A class derived from a published part, one of the user's, or a part of which a method was edited or
    replaced stays as it is.

    Raises:
        ValueError: the model is in training mode, where BatchNorm uses the batch's statistics.
    """
    check_evaluation(model)
    for part in list(model.modules()):
        if is_exactly(part, SeparableConv) and isinstance(part.dwconv, nn.Conv2d) and part.dwconv.groups > 1:
            # Under the name of the first one, which takes the spikes.
            part.dwconv = _depthwise_then_pointwise(part.dwconv, part.pwconv2, part.bn2)
            part.pwconv2, part.bn2 = nn.Identity(), nn.Identity()
        for name, child in list(part.named_children()):
            if _is_rep_conv(child):
                setattr(part, name, _merged_rep_conv(child))


def _is_rep_conv(layer: nn.Module) -> bool:
    if type(layer) is not nn.Sequential or len(layer) != 2:
        return False
    if type(layer[1]) is not nn.BatchNorm2d or not is_exactly(layer[0], RepConv):
        return False
    return is_exactly(layer[0].body[1], BorderedBatchNorm)  # type: ignore[index, arg-type]


def _merged_rep_conv(layers: Any) -> nn.Conv2d:
    """One 3x3 convolution with padding 1 and bias that computes RepConv and the BatchNorm after it."""
    first, bordered, (depthwise, second, inner) = layers[0].body
    scale, shift = _scale_and_shift(bordered.bn)
    W1 = scale[:, None] * first.weight.double()[:, :, 0, 0]  # [C, C]
    k = depthwise.weight.double()[:, 0]  # [C, 3, 3]
    W2 = second.weight.double()[:, :, 0, 0]  # [C, C]
    kernel = torch.einsum("om,mij,mc->ocij", W2, k, W1)
    bias = W2 @ (shift * k.sum(dim=(1, 2)))
    for norm in (inner, layers[1]):
        scale, shift = _scale_and_shift(norm)
        kernel, bias = scale[:, None, None, None] * kernel, scale * bias + shift
    return _convolution(kernel, bias).to(first.weight.dtype)


def _depthwise_then_pointwise(depthwise: nn.Conv2d, pointwise: Any, norm: Any) -> nn.Conv2d:
    """One convolution that computes both and the BatchNorm after them."""
    kernel = pointwise.weight.double()[:, :, 0, 0, None, None] * depthwise.weight.double()[None, :, 0]
    merged: nn.Conv2d = folded(_convolution(kernel, None), norm)
    return merged.to(depthwise.weight.dtype)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What BatchNorm multiplies with and adds in evaluation, `[C]`, float64."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def _convolution(kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A float64 convolution that keeps the size."""
    c_out, c_in, side, _ = kernel.shape
    settings: dict[str, Any] = dict(padding=side // 2, device=kernel.device, dtype=torch.float64)
    conv = nn.Conv2d(c_in, c_out, side, bias=bias is not None, **settings).eval()
    conv.weight.copy_(kernel)
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv
