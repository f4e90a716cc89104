"""Where self-attention looks: the paper's V_S and its masked form, averaged over time and heads (figures 3 and S3).

The code's `q` is the paper's V_S; the mask g(Q_S, K_S) keeps some of its channels. Averaged over T and all channels
(heads and the channels of a head), each is a map over the tokens.

Legend: T time steps, B batch, C channels, D embed_dims, H x W image, H' x W' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from utils.data.transforms import eval_transform
from utils.errors import UserError
from utils.events.pictures import colour
from utils.run.hooks import ForwardHook, hooked

if TYPE_CHECKING:
    from utils.data.facts import DataSettings

_OVERLAY = 0.65
_MAP_COLOURS = "inferno"


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of one batch: `vs` and `masked` are [blocks, B, H', W'], mean firing rates per token."""

    vs: Tensor
    masked: Tensor


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> AttentionMaps:
    """The maps of every block for images `[B, C, H, W]` or event frames `[B, T, C, H, W]`; model in evaluation mode."""
    sources: dict[str, nn.Module] = model.spike_sources()  # type: ignore[operator]
    found: dict[str, Tensor] = {}

    def keep(name: str) -> ForwardHook:
        # [T, B, D, H', W'] -> [B, H', W'] at once: the spikes themselves are not kept
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[name] = output.detach().float().mean(dim=(0, 2))

        return hook

    shown = {name: module for name, module in sources.items() if name.endswith(("_q_lif", "_x_after_qkv"))}
    training = model.training
    model.eval()
    try:
        with hooked(shown, keep):
            model(x)
    finally:
        model.train(training)
    vs, masked = (
        torch.stack([found[name] for name in shown if name.endswith(end)]) for end in ("_q_lif", "_x_after_qkv")
    )
    return AttentionMaps(vs.cpu(), masked.cpu())


def read_images(paths: Sequence[str], data: DataSettings, device: torch.device) -> Tensor:
    """Image files as the evaluation shows them to the model: normalised, `[B, C, H, W]` on `device`.

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
            raise UserError(f"attention_map: {path}: {reason}; give a number of samples or image files") from error
    x = torch.stack(images).to(device)
    if data.normalise_on_device:
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        x = (x.float() / 255 - mean) / std
    return x


def to_pictures(x: Tensor, data: DataSettings) -> Tensor:
    """What a person sees of the input: `[B, H, W, 3]` in 0..1. Event frames: both polarities, summed over time."""
    x = x.detach().cpu().float()
    if x.dim() == 5:
        return torch.stack([torch.from_numpy(colour(sample.numpy())) for sample in x.sum(dim=1)]) / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    picture = (x * std + mean).clamp(0, 1)  # [B, C, H, W]
    return picture.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def draw_attention_maps(pictures: Tensor, maps: AttentionMaps, target: Path, titles: Sequence[str]) -> None:
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
    figure.savefig(target, dpi=110)


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
