"""BatchNorm folded into the convolution before it, for evaluation and export.

In evaluation BatchNorm is a scale and a shift per channel; a convolution takes both into its weights and its bias.
"""

from __future__ import annotations

import torch
from torch import nn


def fold_batchnorm(model: nn.Module) -> None:
    """Fold each `<name>_bn<i>` of `model` into its `<name>_conv<i>`, in place; the BatchNorm becomes an identity.

    Computed in float64 and rounded once to the weights' dtype.

    Raises:
        ValueError: the model is in training mode, where BatchNorm uses the batch's statistics.
    """
    if model.training:
        raise ValueError("BatchNorm can only be folded in evaluation mode; call model.eval() first")
    for parent in model.modules():
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                conv = getattr(parent, name.replace("_bn", "_conv"))
                setattr(parent, name.replace("_bn", "_conv"), _folded(conv, norm))
                setattr(parent, name, nn.Identity())


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that computes `norm(conv(x))`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale = scale * norm.weight.double()
        shift = shift * norm.weight.double() + norm.bias.double()
    weight = conv.weight
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device=weight.device,
        dtype=weight.dtype,
    )
    folded.weight.copy_(weight.double() * scale[:, None, None, None])
    assert folded.bias is not None
    folded.bias.copy_(shift if conv.bias is None else shift + conv.bias.double() * scale)
    folded.requires_grad_(weight.requires_grad)
    return folded.eval()
