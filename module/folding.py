"""BatchNorm folded into the convolution before it, for evaluation and export.

In evaluation BatchNorm is a scale and a shift per channel; a convolution takes both into its weights and its bias.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv
from module.sps import MS_SPS
from module.v2.conv import ConvBlock, DownSampling, SeparableConv
from module.v2.mlp import MLP

# In these each `<name>bn<i>` acts on what `<name>conv<i>` gives and on nothing else. In a class derived from them, or
# in one of the user's, this is not known, so BatchNorm stays there.
_PARTS = (MS_SPS, MS_SSA_Conv, MS_MLP_Conv, DownSampling, ConvBlock, MLP)
# Where the names do not say it: BatchNorm -> convolution.
_PAIRS: dict[type[nn.Module], dict[str, str]] = {SeparableConv: {"bn1": "pwconv1", "bn2": "pwconv2"}}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def folded(conv: Any, norm: Any) -> Any:
    """A convolution that computes `norm(conv(x))` in evaluation; computed in float64 and rounded once.

    `norm` is a BatchNorm, or an identity where it was folded before.
    """
    if isinstance(norm, nn.Identity):
        return copy.deepcopy(conv).eval()
    with torch.no_grad():
        exact = fuse_conv_bn_eval(copy.deepcopy(conv).double().eval(), copy.deepcopy(norm).double().eval())
    return exact.to(conv.weight.dtype)


def is_exactly(part: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `part` is of one of these classes, with a faster way attached to it or not, and not of a derived one."""
    return getattr(type(part), "plain_class", type(part)) in kinds


def check_evaluation(model: nn.Module) -> None:
    """ValueError in training mode, where BatchNorm uses the batch's statistics."""
    if model.training:
        raise ValueError("BatchNorm can only be folded in evaluation mode; call model.eval() first")


def fold_batchnorm(model: nn.Module) -> None:
    """Fold the BatchNorms of the published parts of `model` in place; each becomes an identity.

    Raises:
        ValueError: the model is in training mode.
    """
    check_evaluation(model)
    for part in model.modules():
        if not is_exactly(part, *_PARTS, *_PAIRS):
            continue
        pairs = _PAIRS.get(getattr(type(part), "plain_class", type(part)), {})
        for name, norm in list(part.named_children()):
            if type(norm) in _NORMS:
                conv_name = pairs.get(name) or name.replace("bn", "conv")
                setattr(part, conv_name, folded(getattr(part, conv_name), norm))
                setattr(part, name, nn.Identity())
