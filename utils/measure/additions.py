"""Products computed by nothing but additions of the weights, or values, that spikes choose.

Legend: n images or steps, C channels, M x K times K x N.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from utils.measure.geometry import Geometry

_SPIKES_AT_ONCE = 1 << 16  # rows of weights gathered at a time: bounds the memory


def add_rows(spikes: Tensor, rows: Tensor, pairs: bool = False) -> tuple[Tensor, int]:
    """`spikes` `[b, M, K]` of 0 and 1 times `rows` `[b, K, N]`, and the number of additions.

    Args:
        pairs: where the rows of one of the b are spikes as well, their zeros are not added.
    """
    b, M, K = spikes.shape
    N = rows.shape[2]
    y = rows.new_zeros(b * M, N)
    of, row, chosen = spikes.nonzero(as_tuple=True)
    flat = rows.reshape(b * K, N)
    _gather_and_add(y, of * M + row, flat, of * K + chosen)
    added = rows.new_full((b, K), N)
    if pairs:
        binary = ((rows == 0) | (rows == 1)).flatten(1).all(dim=1)
        added = torch.where(binary.unsqueeze(1), rows.ne(0).sum(dim=2).to(rows.dtype), added)
    return y.view(b, M, N), int(added[of, chosen].sum())


def add_conv(spikes: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
    """A convolution of `spikes` `[n, C, *places]` of 0 and 1 without its bias, and the number of additions."""
    kernel, groups = geometry.kernel_size, geometry.groups
    places = spikes.shape[2:]
    shape = tuple(geometry.outputs(axis, size) for axis, size in enumerate(places))
    if geometry.transposed:
        weights = weight.flatten(2)  # [C, C' / groups, taps]
    else:  # [C', C / groups, ...] -> the same
        weights = weight.flatten(2).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    fan_out = weights.shape[1]
    image, channel, *place = spikes.nonzero(as_tuple=True)
    y = spikes.new_zeros(len(spikes) * math.prod(shape) * groups, fan_out)
    additions = 0
    for tap, offsets in enumerate(itertools.product(*(range(k) for k in kernel))):
        target, reached = image, torch.ones_like(image, dtype=torch.bool)
        for axis, offset in enumerate(offsets):
            at, valid = geometry.reached(axis, place[axis], offset)
            target, reached = target * shape[axis] + at, reached & valid & (at >= 0) & (at < shape[axis])
        target = target * groups + channel // (spikes.shape[1] // groups)
        _gather_and_add(y, target[reached], weights[:, :, tap], channel[reached])
        additions += int(reached.sum()) * fan_out
    y = y.view(len(spikes), *shape, groups * fan_out)
    return y.movedim(-1, 1).contiguous(), additions


def _gather_and_add(y: Tensor, targets: Tensor, weights: Tensor, chosen: Tensor) -> None:
    for start in range(0, len(targets), _SPIKES_AT_ONCE):
        part = slice(start, start + _SPIKES_AT_ONCE)
        y.index_add_(0, targets[part], weights[chosen[part]])
