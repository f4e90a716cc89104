"""Event data sets: frames of each sample, from whichever files there are, and what a sample goes through.

Samples are (frames, class index). Frames are [T, 2, H, W], OFF before ON: event counts, not normalised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms import functional as F

from utils import ROOT
from utils.data.facts import dataset_facts
from utils.errors import UserError
from utils.events import digits as digits_dvs
from utils.events.augment import Operation, frame_operations
from utils.events.files import (
    EVENTS,
    frames_folder,
    list_samples,
    make_folder,
    make_frames,
    progress_bar,
    spikingjelly_datasets,
    write_events,
)
from utils.events.readers import DroppingReader, FramesReader, TetReader
from utils.events.sources import SOURCES, EventSource, check_complete, event_samples, prepare_events, what_to_do
from utils.events.splits import Sample, Split, check_hash, split_by_folder, split_by_name
from utils.events.tet import open_tet

if TYPE_CHECKING:
    from utils.config.settings import Config

_logger = logging.getLogger("sdt")

DIGITS_FILE = ROOT / "data" / "digits" / "digits.npz"
# Found, and made, from any current directory.
DIGITS_DVS_ROOT = ROOT / "data" / "digits-dvs"
# Settings that act on images only.
_IMAGE_ONLY = ("scale", "ratio", "hflip", "vflip", "color_jitter", "aa")


class EventDataset:
    """One part of an event data set.

    samples:   paths relative to wherever `read` looks them up, and class indices
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


class FrameTransform:
    """Resize (without antialias, as published), augment, and convert to the type that travels to the device."""

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
    """Open one part of an event data set, made or converted where that is still to be done.

    Args:
        size: C, H, W that the model takes.

    Raises:
        UserError: files are missing, damaged or incomplete, or the settings do not fit them.
    """
    _check_split_setting(cfg)
    if cfg.dataset == "cifar10-dvs-tet":
        split, classes, read = _open_tet(cfg, size[1], training)
    else:
        split, classes, read = _open_events(cfg, training)
    root = events_root(cfg)
    check_hash(split, cfg.split_hash, str(root))
    samples = split.train if training else split.test
    dataset = EventDataset(samples, classes, split.hash, read)
    operations = frame_operations(cfg) if training else []
    dataset.transform = FrameTransform(size[1], size[2], operations, cfg.event_wire)
    if training:
        _warn_of_image_settings(cfg)
        _logger.info(f"{cfg.dataset}: {len(split.train)} + {len(split.test)} samples, split {split.hash} ({root})")
    return dataset


def events_root(cfg: Config) -> Path:
    """Where the files of `cfg.dataset` are."""
    if cfg.dataset == "digits-dvs":
        return Path(cfg.data_dir) if cfg.data_dir else DIGITS_DVS_ROOT
    return Path(cfg.data_dir or dataset_facts(cfg.dataset).default_root)


def _check_split_setting(cfg: Config) -> None:
    allowed = {"cifar10-dvs": ("", "first90", "random"), "cifar10-dvs-tet": ("", "tet")}.get(cfg.dataset, ("",))
    if cfg.event_split.partition(":")[0] not in allowed:
        known = "first90 or random:SEED" if len(allowed) > 2 else "none but the one its folders bring; leave it out"
        raise UserError(f"event_split: {cfg.event_split!r} does not fit dataset {cfg.dataset!r}; valid: {known}")


def _warn_of_image_settings(cfg: Config) -> None:
    given = [name for name in _IMAGE_ONLY if name in cfg.explicit and getattr(cfg, name)]
    if given:
        _logger.info(f"event data: {', '.join(given)} act on images only; for events see the event settings")


_Opened = tuple[Split, list[str], Callable[[Sample], Tensor]]


def _open_tet(cfg: Config, side: int, training: bool) -> _Opened:
    root = events_root(cfg)
    if cfg.event_drop and training:
        raise UserError("event_drop: needs events, and .pt files hold frames; use dataset cifar10-dvs")
    read = TetReader(root, cfg.time_steps, side, cfg.tet_counts == "published")
    return open_tet(root), SOURCES["cifar10-dvs"].classes, read


def _open_events(cfg: Config, training: bool) -> _Opened:
    root, source, steps = events_root(cfg), SOURCES[cfg.dataset], cfg.time_steps
    if cfg.dataset == "digits-dvs":
        make_digits_dvs(root)
    elif cfg.dataset_download and not (root / EVENTS).is_dir():
        prepare_events(source, root, download=True)
    folder = root / frames_folder(steps)
    on_the_fly = cfg.event_drop and training and not cfg.no_aug
    if (root / EVENTS).is_dir():
        samples = event_samples(source, root)
        if not on_the_fly:
            make_frames(root, samples, steps, source.side)
    elif folder.is_dir() and not on_the_fly:  # somebody kept the frames only
        samples = list_samples(folder, source.folders)
        check_complete(source, root, folder, samples)
    else:
        raise UserError(what_to_do(source, root))
    if source.parts:
        split = split_by_folder(samples, source.classes)
    else:
        split = split_by_name(samples, source.classes, cfg.event_split or "first90")

    if not on_the_fly:
        return split, source.classes, FramesReader(folder, steps, source.side)
    spikingjelly_datasets()  # before the loader's processes start, so that they share it
    return split, source.classes, DroppingReader(root / EVENTS, steps, source.side)


def make_digits_dvs(root: Path) -> None:
    """Complete the embedded event set in `root`."""
    source = SOURCES["digits-dvs"]
    expected = digits_dvs.expected_files(DIGITS_FILE)
    present = list_samples(root / EVENTS, source.folders)
    if {folder: len(numbers) for folder, numbers in expected.items()} == {
        folder: len(names) for folder, names in present.items()
    }:
        return
    for folder in source.folders:
        make_folder(root / EVENTS / folder)
    total = sum(map(len, expected.values()))
    with progress_bar(total, "simulating digits-dvs, once", "sample") as bar:
        digits_dvs.make(DIGITS_FILE, root / EVENTS, write_events, bar.update)


def event_source(name: str) -> EventSource:
    """The files behind an event data set; the `.pt` form comes from those of cifar10-dvs."""
    return SOURCES[name.removesuffix("-tet")]
