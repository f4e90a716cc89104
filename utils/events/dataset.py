"""Event data sets: frames of each sample, from the files that there are, and their transform.

Samples are (frames, class index). Frames are [T, 2, H, W], OFF before ON: event counts, not normalised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as F

from utils.config.settings import Config
from utils.errors import UserError
from utils.events.augment import Operation, drop_events, frame_operations
from utils.events.files import (
    EVENTS,
    frames_folder,
    integrate,
    list_samples,
    make_frames,
    read_events,
    read_npz,
    spikingjelly_datasets,
)
from utils.events.sources import SOURCES, EventSource, check_complete, event_samples, prepare_events, what_to_do
from utils.events.splits import Sample, Split, check_hash
from utils.events.tet import TetReader, open_tet
from utils.npz import REAL

_logger = logging.getLogger("sdt")

# Settings that act on images only.
_IMAGE_ONLY = ("scale", "ratio", "hflip", "vflip", "color_jitter", "aa")


class EventDataset:
    """One part of an event data set.

    samples:   paths below the folder from which `read` reads, and class indices
    read:      sample -> frames [T, 2, H, W] of any number type
    transform: frames -> what the loader stacks
    """

    def __init__(
        self, samples: list[Sample], classes: list[str], split_hash: str, read: Callable[[Sample], Tensor]
    ) -> None:
        self.samples, self.split_hash, self.read = samples, split_hash, read
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        self.transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        sample = self.samples[index]
        frames = self.read(sample)
        if self.transform is None:
            return frames, sample.label
        try:
            return self.transform(frames), sample.label
        except OverflowError as error:
            raise UserError(
                f"event_wire: uint8 cannot carry {sample.path}, {error}; set event_wire: float32"
            ) from error


# What reads a sample: counts [T, 2, H, W], OFF before ON, as float32. Classes, since the loader pickles them.


@dataclass(frozen=True)
class FramesReader:
    """Frames integrated before, below `folder`."""

    folder: Path
    time_steps: int
    side: int

    def __call__(self, sample: Sample) -> Tensor:
        path = self.folder / sample.path
        frames = read_npz(path, {"frames": REAL})["frames"]
        expected = (self.time_steps, 2, self.side, self.side)
        if frames.shape != expected:
            raise UserError(
                f"{path} holds frames of shape {list(frames.shape)}, expected {list(expected)}; "
                f"delete {self.folder} and start again"
            )
        if not (np.isfinite(frames) & (frames >= 0)).all():
            raise UserError(f"{path} holds counts below 0 or no numbers; delete {self.folder} and start again")
        return torch.from_numpy(frames.astype("float32"))


@dataclass(frozen=True)
class DroppingReader:
    """Events below `folder`, of which EventDrop leaves out some before they are integrated."""

    folder: Path
    time_steps: int
    side: int

    def __call__(self, sample: Sample) -> Tensor:
        path = self.folder / sample.path
        events = drop_events(read_events(path, self.side), self.side, least=self.time_steps)
        return torch.from_numpy(integrate(events, self.time_steps, self.side, path).astype("float32"))


class FrameTransform:
    """Resize (without antialias, as published), augment, and convert to the type that is sent to the device."""

    def __init__(self, height: int, width: int, operations: list[Operation], wire: str) -> None:
        self.size, self.operations = [height, width], operations
        self.bytes = wire == "uint8"

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [T, 2, H, W] -> [T, 2, height, width], float32 or uint8."""
        frames = frames.float()
        if list(frames.shape[-2:]) != self.size:
            frames = F.resize(frames, self.size, antialias=False)
        for operation in self.operations:
            frames = operation(frames)
        if not self.bytes:
            return frames
        result = frames.to(torch.uint8)
        if not torch.equal(result.float(), frames):
            what = "whose counts are not whole after resizing" if frames.frac().any() else "which has counts above 255"
            raise OverflowError(what)
        return result


def build_events(cfg: Config, size: tuple[int, int, int], *, training: bool) -> EventDataset:
    """Open one part of an event data set; what still has to be made or converted is done first.

    Args:
        size: C, H, W that the model takes.

    Raises:
        UserError: files are missing, damaged or incomplete, or the settings do not fit them.
    """
    source, root = SOURCES[cfg.dataset], events_root(cfg)
    check_split_name(cfg.event_split, source, cfg.dataset)
    read: Callable[[Sample], Tensor]
    if source.tet_of:
        if cfg.event_drop and training:
            raise UserError(f"event_drop: needs events, and .pt files hold frames; use dataset {source.tet_of}")
        split = open_tet(root)
        read = TetReader(root, cfg.time_steps, size[1], cfg.tet_counts == "published")
    else:
        split, read = _open_events(cfg, source, root, dropping=cfg.event_drop and training and not cfg.no_aug)
    check_hash(split, cfg.split_hash, str(root))
    dataset = EventDataset(split.train if training else split.test, source.classes, split.hash, read)
    operations = frame_operations(cfg) if training else []
    dataset.transform = FrameTransform(size[1], size[2], operations, cfg.event_wire)
    if training:
        given = [name for name in _IMAGE_ONLY if name in cfg.explicit and getattr(cfg, name)]
        if given:
            _logger.info(f"event data: {', '.join(given)} act on images only; for events see the event settings")
        _logger.info(f"{cfg.dataset}: {len(split.train)} + {len(split.test)} samples, split {split.hash} ({root})")
    return dataset


def read_sample_file(cfg: Config, path: Path, size: tuple[int, int, int]) -> Tensor:
    """An event file (`.npz` with t, x, y, p) of the sensor of `cfg.dataset` as one sample `[1, T, 2, H, W]`, float32.

    Args:
        size: C, H, W that the model takes.

    Raises:
        UserError: the file is missing, damaged, of another kind, or has fewer events than time steps.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .npz file with the arrays t, x, y, p")
    side = SOURCES[cfg.dataset].side
    frames = integrate(read_events(path, side), cfg.time_steps, side, path)
    return FrameTransform(size[1], size[2], [], "float32")(torch.from_numpy(frames.astype("float32"))).unsqueeze(0)


def events_root(cfg: Config) -> Path:
    """Where the files of `cfg.dataset` are."""
    return Path(cfg.data_dir or SOURCES[cfg.dataset].root)


def check_split_name(name: str, source: EventSource, dataset: str) -> None:
    """UserError unless `name` (setting `event_split`) is one of the splits of `source`; `dataset` for the message."""
    if name.partition(":")[0] not in ("", *source.splits):
        valid = " or ".join("random:SEED" if known == "random" else known for known in source.splits)
        if len(source.splits) < 2:
            valid = "none but the one its folders bring; leave it out"
        raise UserError(f"event_split: {name!r} does not fit dataset {dataset!r}; valid: {valid}")


def _open_events(
    cfg: Config, source: EventSource, root: Path, *, dropping: bool
) -> tuple[Split, Callable[[Sample], Tensor]]:
    """The split, and what reads a sample; with `dropping` it makes the frames from the events, each time."""
    steps = cfg.time_steps
    if source.make or (cfg.dataset_download and not (root / EVENTS).is_dir()):
        prepare_events(source, root, download=cfg.dataset_download)
    folder = root / frames_folder(steps)
    if (root / EVENTS).is_dir():
        samples = event_samples(source, root)
        if not dropping:
            make_frames(root, samples, steps, source.side)
    elif folder.is_dir() and not dropping:  # the events were deleted
        samples = list_samples(folder, source.folders)
        check_complete(source, root, folder, samples)
    else:
        raise UserError(what_to_do(source, root))
    split = source.split(samples, cfg.event_split)
    if not dropping:
        return split, FramesReader(folder, steps, source.side)
    spikingjelly_datasets()  # before the loader's processes start, so that they share it
    return split, DroppingReader(root / EVENTS, steps, source.side)
