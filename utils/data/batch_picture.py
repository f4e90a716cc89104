"""A training batch as one picture: as the loader gives it, before it is mixed, with the normalisation undone.

Legend: B batch, T time steps, C channels (1 grey, 2 events, 3 RGB), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from utils.events.pictures import colour

_IMAGES, _EVENT_ROWS = 64, 8  # at most
_SIDE = 64  # pixels that a small image is enlarged to, at least
_GAP = 2  # pixels between two images
_GAP_GREY = {4: 255, 5: 208}  # by dimensions: event frames are white themselves


def save_batch(x: Tensor, mean: Sequence[float], std: Sequence[float], path: Path) -> Path:
    """Write the first images of a batch as a grid, or of event frames one row per sample with its T frames.

    x:          normalised images [B, C, H, W] or frames [B, T, C, H, W]; with C = 2, channel 0 counts OFF events
                and channel 1 ON events, and full colour is the sample's 99th percentile of counts above 0
    mean, std:  C values each, in which `x` is normalised
    path:       the PNG; its folder exists

    Returns `path`.
    """
    if x.ndim not in (4, 5) or x.shape[-3] not in (1, 2, 3) or not len(mean) == len(std) == x.shape[-3]:
        raise ValueError(f"images [B, C, H, W] or frames [B, T, C, H, W] with C = len(mean) in 1..3, not {x.shape}")
    samples = x[: _IMAGES if x.ndim == 4 else _EVENT_ROWS].detach().float().cpu().numpy()
    shape = (-1, 1, 1)
    samples = samples * np.reshape(std, shape) + np.reshape(mean, shape)
    if x.ndim == 4:
        columns = math.ceil(math.sqrt(len(samples)))
        tiles = [_coloured(sample) for sample in samples]
    else:
        columns = samples.shape[1]
        tiles = [frame for sample in samples for frame in _coloured(sample)]
    Image.fromarray(_grid(tiles, columns, _GAP_GREY[x.ndim])).save(path, format="png")
    return path


def _coloured(values: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W, 3] of values in 0..1, or of event counts, [..., C, H, W]."""
    if values.shape[-3] == 2:
        return colour(values)
    values = np.moveaxis(values, -3, -1)
    values = np.broadcast_to(values, (*values.shape[:-1], 3))
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def _grid(tiles: list[np.ndarray], columns: int, background: int) -> np.ndarray:
    """Tiles [H, W, 3] row by row, enlarged by a whole factor where they are small."""
    height, width = tiles[0].shape[:2]
    factor = max(1, math.ceil(_SIDE / max(height, width)))
    height, width = height * factor, width * factor
    rows = math.ceil(len(tiles) / columns)
    grid = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), background, np.uint8)
    for i, tile in enumerate(tiles):
        top = _GAP + i // columns * (height + _GAP)
        left = _GAP + i % columns * (width + _GAP)
        grid[top : top + height, left : left + width] = tile.repeat(factor, 0).repeat(factor, 1)
    return grid
