"""Pictures of event samples: ON and OFF in two colours on white, as a contact sheet and as an animated GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Different also for colour-blind readers and in grey print (Okabe & Ito).
_OFF, _ON = np.array([213, 94, 0]), np.array([0, 114, 178])
_FULL = 0.99  # quantile of the counts above zero that gets the full colour, so that one noisy pixel changes nothing

_GIF_SIDE, _GIF_GAP, _FRAME_MS = 128, 4, 120

Frames = NDArray[Any]  # [T, 2, H, W], OFF before ON


def colour(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """Counts [..., 2, H, W], OFF before ON -> RGB [..., H, W, 3]: the more events, the darker; no event is white."""
    positive = frames[frames > 0]
    full = float(np.quantile(positive, _FULL)) if positive.size else 1.0
    off, on = np.moveaxis(np.clip(frames / full, 0.0, 1.0), -3, 0)[..., None]  # [..., H, W, 1] each
    ink = off * (255 - _OFF) + on * (255 - _ON)
    return np.asarray(np.clip(255 - ink, 0, 255).round().astype(np.uint8))


def draw_samples(samples: list[tuple[Frames, str]], target: Path, title: str) -> None:
    """One row per sample, one column per time step."""
    steps = len(samples[0][0])
    figure = Figure(figsize=(1.1 * steps + 0.8, 1.15 * len(samples) + 0.7), layout="constrained")
    grid = figure.subplots(len(samples), steps, squeeze=False)
    for row, (frames, name) in zip(grid, samples, strict=True):
        for t, (axes, image) in enumerate(zip(row, colour(frames), strict=True)):
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#CCCCCC")
            if axes.get_subplotspec().is_first_row():
                axes.set_title(f"t = {t + 1}", fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"{title}: ON events blue, OFF events red", fontsize=10)
    figure.savefig(target, dpi=100)


def animate_samples(samples: list[tuple[Frames, str]], target: Path) -> None:
    """All samples side by side, one image of the GIF per time step, in an endless loop."""
    side = samples[0][0].shape[-1]
    scale = max(1, _GIF_SIDE // side)
    strips = []
    for t in range(len(samples[0][0])):
        tiles = []
        for frames, _ in samples:
            tile = colour(frames)[t].repeat(scale, 0).repeat(scale, 1)
            tiles.append(np.pad(tile, ((0, 0), (0, _GIF_GAP), (0, 0)), constant_values=204))
        strips.append(Image.fromarray(np.concatenate(tiles, axis=1)))
    strips[0].save(target, save_all=True, append_images=strips[1:], duration=_FRAME_MS, loop=0)
