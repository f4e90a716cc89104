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

# In these each `<name>_bn<i>` acts on what `<name>_conv<i>` gives and on nothing else. In a class derived from them,
# or in one of the user's, this is not known, so BatchNorm stays there.
_PARTS = (MS_SPS, MS_SSA_Conv, MS_MLP_Conv)


def folded(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """A convolution that computes `norm(conv(x))` in evaluation; computed in float64 and rounded once.

    `norm` is a BatchNorm, or an identity where it was folded before.
    """
    if isinstance(norm, nn.Identity):
        return copy.deepcopy(conv).eval()
    with torch.no_grad():
        exact = fuse_conv_bn_eval(copy.deepcopy(conv).double().eval(), copy.deepcopy(norm).double().eval())
    return exact.to(conv.weight.dtype)


def fold_batchnorm(model: nn.Module) -> None:
    """Fold the BatchNorms of the published parts of `model` in place; each becomes an identity.

    Raises:
        ValueError: the model is in training mode, where BatchNorm uses the batch's statistics.
    """
    if model.training:
        raise ValueError("BatchNorm can only be folded in evaluation mode; call model.eval() first")
    for part in model.modules():
        if getattr(type(part), "plain_class", type(part)) not in _PARTS:
            continue
        for name, norm in list(part.named_children()):
            conv_name = name.replace("_bn", "_conv")
            if type(norm) is nn.BatchNorm2d:
                setattr(part, conv_name, folded(getattr(part, conv_name), norm))
                setattr(part, name, nn.Identity())
