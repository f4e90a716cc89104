"""BatchNorm folded into the convolution before it, for evaluation and export.

In evaluation BatchNorm is a scale and a shift per channel; a convolution takes both into its weights and its bias.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from module.attention import MS_SSA_Conv
from module.fingerprint import edited
from module.mlp import MS_MLP_Conv
from module.sps import MS_SPS
from module.v2.conv import ConvBlock, DownSampling, SeparableConv
from module.v2.mlp import MLP

_logger = logging.getLogger("sdt")
# In these each `<name>bn<i>` acts on what `<name>conv<i>` gives and on nothing else. In a class derived from them, or
# in one of the user's, this is not known, so BatchNorm stays there.
_PARTS = (MS_SPS, MS_SSA_Conv, MS_MLP_Conv, DownSampling, ConvBlock, MLP)
# Where the names do not say it: BatchNorm -> convolution.
_PAIRS: dict[type[nn.Module], dict[str, str]] = {SeparableConv: {"bn1": "pwconv1", "bn2": "pwconv2"}}
# What folding and merging rely on: the functions of a published part that say in which order its layers run, with their
# fingerprints (tests/test_merging_v2.py prints them).
_ORDER: dict[str, dict[str, str]] = {
    "MS_SPS": {"module.sps:MS_SPS.forward": "2873216da8b6d0ed"},
    "MS_SSA_Conv": {
        "module.attention:MS_SSA_Conv.forward": "3225509fd151238d",
        "module.attention:MS_SSA_Conv._attend": "0929b7a5af6a0b1f",
    },
    "MS_MLP_Conv": {"module.mlp:MS_MLP_Conv.forward": "18b6a4899aa3eb8b"},
    "DownSampling": {"module.v2.conv:DownSampling.forward": "fa4c5855429ad28b"},
    "ConvBlock": {"module.v2.conv:ConvBlock.forward": "10cab47de2b98efe"},
    "SeparableConv": {"module.v2.conv:SeparableConv.forward": "7054ae12278d413b"},
    "MLP": {"module.v2.mlp:MLP.forward": "d4c058194df6c0b7"},
    "RepConv": {"module.v2.repconv:RepConv.forward": "d77f7a91046eac99"},
    "BorderedBatchNorm": {
        "module.v2.repconv:BorderedBatchNorm.forward": "1ad42e8d54dba4dd",
        "module.v2.repconv:BorderedBatchNorm.border": "06eb4daf4a4d516b",
    },
}
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
    """Whether `part` is of one of these published classes as it was written: not of a derived one, with or without a
    faster way attached to it, and with no method edited or replaced."""
    kind = getattr(type(part), "plain_class", type(part))
    return kind in kinds and not _edits(part)


def _edits(part: nn.Module) -> list[str]:
    """The functions of a published part that are not as they were written."""
    kind = getattr(type(part), "plain_class", type(part))
    order = _ORDER.get(kind.__name__, {}) if kind.__module__.startswith("module.") else {}
    return edited(order) or [name for name in order if name.rpartition(".")[2] in vars(part)]


def check_evaluation(model: nn.Module) -> None:
    """ValueError in training mode, where BatchNorm uses the batch's statistics."""
    if model.training:
        raise ValueError("BatchNorm can only be folded in evaluation mode; call model.eval() first")


def fold_batchnorm(model: nn.Module) -> None:
    """Fold the BatchNorms of the published parts of `model` in place; each becomes an identity. A part of which a
    method was edited or replaced stays as it is, and one line says so.

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
    for kind, names in sorted({(type(part).__name__, ", ".join(_edits(part))) for part in model.modules()}):
        if names:
            _logger.warning(f"warning: {kind} stays as it is, nothing in it is folded: {names} was edited")
