"""How the frames of one sample are read: from frames made before, from its events, or from a `.pt` file.

Each reader is called with a sample and gives counts [T, 2, H, W], OFF before ON, as float32. The loader sends them to
its processes, so they are objects that can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.events.augment import drop_events
from utils.events.files import integrate, read_events, read_npz
from utils.events.splits import Sample
from utils.events.tet import exact_frames, published_frames, read_tet


@dataclass(frozen=True)
class FramesReader:
    """Frames integrated before, below `folder`."""

    folder: Path
    time_steps: int
    side: int

    def __call__(self, sample: Sample) -> Tensor:
        path = self.folder / sample.path
        frames = read_npz(path, ("frames",))["frames"]
        expected = (self.time_steps, 2, self.side, self.side)
        if frames.shape != expected:
            raise UserError(
                f"{path} holds frames of shape {list(frames.shape)}, expected {list(expected)}; "
                f"delete {self.folder} and start again"
            )
        return torch.from_numpy(frames.astype("float32"))


@dataclass(frozen=True)
class DroppingReader:
    """Events below `folder`, of which EventDrop leaves out some before they are integrated."""

    folder: Path
    time_steps: int
    side: int

    def __call__(self, sample: Sample) -> Tensor:
        path = self.folder / sample.path
        events = drop_events(read_events(path), self.side, least=self.time_steps)
        return torch.from_numpy(integrate(events, self.time_steps, self.side, path).astype("float32"))


@dataclass(frozen=True)
class TetReader:
    """`.pt` files below `root`; `published`: as 8-bit images of `side` pixels, like the published loader."""

    root: Path
    time_steps: int
    side: int
    published: bool

    def __call__(self, sample: Sample) -> Tensor:
        counts, _ = read_tet(self.root / sample.path)
        if counts.shape[-1] != self.time_steps:
            raise UserError(
                f"time_steps: {self.time_steps}, but {self.root / sample.path} holds {counts.shape[-1]} frames; "
                f"set time_steps: {counts.shape[-1]}, or use dataset cifar10-dvs, which any T fits"
            )
        return published_frames(counts, self.side) if self.published else exact_frames(counts)
