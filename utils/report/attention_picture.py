"""The picture of attention maps: one row per sample, the input and over it the maps of each block.

Legend: T time steps, B batch, C channels, H x W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from utils.data.facts import DataSettings
from utils.data.transforms import eval_transform
from utils.errors import UserError
from utils.events.pictures import colour
from utils.measure.attention_map import AttentionMaps, attention_maps
from utils.measure.measurement import Measurement
from utils.report.pictures import Picture, picture_of

_MOST_SAMPLES = 64  # rows of the picture; more would be unreadable, and slow to draw
_OVERLAY = 0.65
_MAP_COLOURS = "inferno"


def attention_picture(measurement: Measurement, asked: list[str]) -> list[Picture]:
    """Draw the maps of `asked`, a number of samples or image files; in the main process alone.

    Where the model does not compute the tensors that maps need, there is none, and the measurement gets a note.

    Raises:
        UserError: neither a number nor image files.
    """
    x, labels = _samples(measurement, asked)
    maps = attention_maps(measurement.model, x)
    if maps is None:
        measurement.notes.append(
            "left out: attention maps, since the model computes no spike tensors known as V_S and masked V_S"
        )
        return []
    if not measurement.process.is_main:
        return []
    return [draw_attention_maps(to_pictures(x, measurement.data), maps, labels)]


def picture_of_samples(measurement: Measurement, x: Tensor, titles: list[str]) -> Picture | None:
    """The maps of these samples; None where the model does not compute the tensors that maps need."""
    if len(x) > _MOST_SAMPLES:
        raise UserError(f"attention maps of {len(x)} samples would be unreadable; give {_MOST_SAMPLES} at most")
    maps = attention_maps(measurement.model, x)
    return None if maps is None else draw_attention_maps(to_pictures(x, measurement.data), maps, titles)


def _samples(measurement: Measurement, asked: list[str]) -> tuple[Tensor, list[str]]:
    """The first samples of the evaluation, or image files; and what is written beside them."""
    if len(asked) == 1 and asked[0].lstrip("+-").isdigit():
        samples = int(asked[0])
        if not 1 <= samples <= _MOST_SAMPLES:
            raise UserError(f"attention_map: {samples} samples; give 1 to {_MOST_SAMPLES}, or image files")
        x, classes = measurement.first_batch(samples)
        return x, [f"class {int(label)}" for label in classes]
    return read_images(asked, measurement.data, measurement.process.device), [Path(path).name for path in asked]


def read_images(paths: Sequence[str], data: DataSettings, device: torch.device) -> Tensor:
    """Image files as the evaluation gives them to the model: normalised, `[B, C, H, W]` on `device`.

    Raises:
        UserError: a file that is missing or no image.
    """
    transform = eval_transform(data)
    images = []
    for path in paths:
        try:
            with Image.open(path) as file:
                images.append(torch.as_tensor(transform(file)))
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else "no image that can be read"
            raise UserError(f"{path}: {reason}; give image files") from error
    x = torch.stack(images).to(device)
    if data.normalise_on_device:
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        x = (x.float() / 255 - mean) / std
    return x


def to_pictures(x: Tensor, data: DataSettings) -> Tensor:
    """The input as a picture: `[B, H, W, 3]` in 0..1. Event frames: both polarities, summed over time."""
    x = x.detach().cpu().float()
    if x.dim() == 5:
        return torch.stack([torch.from_numpy(colour(sample.numpy())) for sample in x.sum(dim=1)]) / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    picture = (x * std + mean).clamp(0, 1)  # [B, C, H, W]
    return picture.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def draw_attention_maps(pictures: Tensor, maps: AttentionMaps, titles: Sequence[str]) -> Picture:
    """One row per sample: the input, then per block V_S and masked V_S over it, each scaled to its own maximum."""
    samples, blocks = len(pictures), len(maps.vs)
    columns = 1 + 2 * blocks
    figure = Figure(figsize=(1.55 * columns, 1.65 * samples + 0.45), layout="constrained")
    grid = figure.subplots(samples, columns, squeeze=False)
    for i in range(samples):
        _show(grid[i][0], pictures[i])
        grid[i][0].set_ylabel(titles[i], fontsize=8)
        for b in range(blocks):
            for axes, values in ((grid[i][1 + 2 * b], maps.vs[b, i]), (grid[i][2 + 2 * b], maps.masked[b, i])):
                _show(axes, pictures[i], values)
                axes.set_xlabel(f"max {float(values.max()):.3f}", fontsize=7)
    grid[0][0].set_title("input", fontsize=9)
    for b in range(blocks):
        grid[0][1 + 2 * b].set_title(f"block {b + 1}\n$V_S$", fontsize=9)
        grid[0][2 + 2 * b].set_title(f"block {b + 1}\nmasked $V_S$", fontsize=9)
    return picture_of(figure, "attention.png", dpi=110)


def _show(axes: Axes, picture: Tensor, values: Tensor | None = None) -> None:
    height, width = picture.shape[:2]
    shown = picture if values is None else picture.mean(dim=-1, keepdim=True).expand(-1, -1, 3)
    axes.imshow(shown.numpy(), extent=(0, width, height, 0), interpolation="nearest")
    if values is not None:
        scaled = values / values.max().clamp_min(1e-12)
        axes.imshow(
            scaled.numpy(),
            cmap=_MAP_COLOURS,
            vmin=0,
            vmax=1,
            extent=(0, width, height, 0),
            alpha=_OVERLAY,
            interpolation="bilinear",  # between the centres of the tokens
        )
    axes.set_xticks([])
    axes.set_yticks([])
