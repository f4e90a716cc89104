"""CIFAR10-DVS as `.pt` files, the format used by temporal efficient training (TET, Deng et al., ICLR 2022).

`train/<i>.pt` and `test/<i>.pt`, i from 0 without gaps, each a pair: counts [2, H, W, T] and label [1]. Labels are
inside the files; `tet_labels.json` keeps them, so that only the first opening reads every file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.types import Strict
from torch import Tensor
from torchvision.transforms import functional as F

from utils import torch_file
from utils.errors import UserError, shortened
from utils.events.files import (
    EVENTS,
    integrate,
    make_folder,
    progress_bar,
    read_events,
    read_record,
    run_jobs,
    whole_file,
    write_json,
)
from utils.events.splits import Sample, Split
from utils.schema import Count, Record, Text

LABELS = "tet_labels.json"
PARTS = ("train", "test")
CLASSES = 10


class _Labels(Record):
    """The file LABELS: class indices by part, and what the files were made of if they were made here."""

    complete: Annotated[bool, Strict()] = True
    made: Annotated[bool, Strict()] = False
    labels: dict[Text, list[Annotated[int, Strict(), Field(ge=0, lt=CLASSES)]]] = Field(default_factory=dict)
    time_steps: Count | None = None
    split: Text | None = None
    split_hash: Text | None = None


def read_tet(path: Path) -> tuple[Tensor, int]:
    """Counts [2, H, W, T] of any number type and label; code in the file is never run.

    Raises:
        UserError: the file cannot be read safely, or holds something else.
    """
    content, _ = torch_file.load(path, str(path))
    if not isinstance(content, (tuple, list)) or len(content) != 2 or not isinstance(content[0], Tensor):
        raise UserError(f"{path} holds no pair of counts [2, H, W, T] and label; replace it")
    counts, label = content
    if counts.dim() != 4 or counts.shape[0] != 2 or not counts.numel():
        raise UserError(f"{path} holds a tensor of shape {list(counts.shape)}, expected [2, H, W, T]; replace it")
    plain = counts.layout is torch.strided and counts.device.type == "cpu" and not counts.is_complex()
    if not plain or not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise UserError(f"{path} holds counts below 0 or no numbers; replace it")
    return counts, _label(label, path)


def _label(label: Any, path: Path) -> int:
    """A class index, as a number or as a tensor of one; whole, though it may be stored as floating point."""
    if isinstance(label, Tensor) and label.numel() == 1 and label.device.type == "cpu" and not label.is_complex():
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | float) or label not in range(CLASSES):
        raise UserError(f"{path} has label {shortened(label)}; valid: 0 to {CLASSES - 1}; replace it")
    return int(label)


def exact_frames(counts: Tensor) -> Tensor:
    """Counts [2, H, W, T] -> frames float32 [T, 2, H, W], each count as it is."""
    return counts.permute(3, 0, 1, 2).float()


def published_frames(counts: Tensor, side: int) -> Tensor:
    """Counts [2, H, W, T] -> frames float32 [T, 2, side, side] in 0..1, as the published loader makes them.

    It goes through 8-bit images: counts wrap at 256 (counts stored as floating point are multiplied by 255 before),
    and resizing treats the two polarities as grey and alpha of one image, with antialiasing.
    """
    bytes_ = counts.mul(255).to(torch.int64) if counts.is_floating_point() else counts.to(torch.int64)
    images = bytes_.remainder(256).to(torch.uint8).permute(3, 0, 1, 2)
    return torch.stack([F.to_tensor(F.resize(F.to_pil_image(image), [side, side])) for image in images])


@dataclass(frozen=True)
class TetReader:
    """`.pt` files below `root`; `published`: as 8-bit images of `side` pixels, like the published loader."""

    root: Path
    time_steps: int
    side: int
    published: bool

    def __call__(self, sample: Sample) -> Tensor:
        counts, label = read_tet(self.root / sample.path)
        if label != sample.label:
            raise UserError(
                f"{self.root / sample.path} has label {label}, {LABELS} says {sample.label}; the file was replaced: "
                f"delete {self.root / LABELS} and start again"
            )
        if counts.shape[-1] != self.time_steps:
            raise UserError(
                f"time_steps: {self.time_steps}, but {self.root / sample.path} holds {counts.shape[-1]} frames; "
                f"set time_steps: {counts.shape[-1]}, or use dataset cifar10-dvs, which any T fits"
            )
        return published_frames(counts, self.side) if self.published else exact_frames(counts)


def open_tet(root: Path) -> Split:
    """Both parts with their labels.

    Raises:
        UserError: folders or files are missing, or a conversion was not finished.
    """
    counts = {part: _count(root, part) for part in PARTS}
    path = root / LABELS
    stored = read_record(_Labels, path) or _Labels()
    if not stored.complete:
        raise UserError(f"{root}: a conversion was interrupted; finish it with python -m utils.prepare cifar10-dvs-tet")
    labels = {part: stored.labels.get(part, []) for part in PARTS}
    if {part: len(labels[part]) for part in PARTS} != counts:
        if stored.made:
            raise UserError(
                f"{root} holds {counts['train']} + {counts['test']} .pt files, "
                f"{' + '.join(str(len(labels[part])) for part in PARTS)} were made; "
                f"delete {path} and both folders, and run python -m utils.prepare cifar10-dvs-tet again"
            )
        labels = {part: _read_labels(root, part, counts[part]) for part in PARTS}
        write_json(path, _Labels(labels=labels).model_dump(exclude_none=True))
    return Split(*([Sample(f"{part}/{i}.pt", label) for i, label in enumerate(labels[part])] for part in PARTS))


def _count(root: Path, part: str) -> int:
    folder = root / part
    names = {path.name for path in folder.glob("*.pt")} if folder.is_dir() else set()
    if not names:
        raise UserError(
            f"{folder} holds no .pt files; put them there, or make them from the events of cifar10-dvs with "
            f"python -m utils.prepare cifar10-dvs-tet --data-dir {root}"
        )
    missing = next((i for i in range(len(names)) if f"{i}.pt" not in names), None)
    if missing is not None:
        raise UserError(f"{folder} has {len(names)} files but no {missing}.pt; they count from 0 without gaps")
    return len(names)


def _read_labels(root: Path, part: str, count: int) -> list[int]:
    return [
        read_tet(root / part / f"{i}.pt")[1]
        for i in progress_bar(count, f"labels of {part}", "file", iterable=range(count))
    ]


def make_tet(root: Path, split: Split, split_name: str, time_steps: int, side: int) -> None:
    """Write the `.pt` files of `split` from `events_np`; continues an interrupted run, and overwrites nothing."""
    path = root / LABELS
    plan = _Labels(
        complete=False,
        made=True,
        time_steps=time_steps,
        split=split_name,
        split_hash=split.hash,
        labels={part: [sample.label for sample in getattr(split, part)] for part in PARTS},
    )
    if (stored := read_record(_Labels, path)) is not None:
        if stored.model_copy(update={"complete": False}) != plan:
            raise UserError(
                f"{path}: the .pt files there are of another split, T or origin; "
                f"delete it with the folders train and test to make new ones"
            )
    elif any((root / part).is_dir() and any((root / part).glob("*.pt")) for part in PARTS):
        raise UserError(f"{root} already holds .pt files that were not made here; move train and test away first")
    write_json(path, plan.model_dump())
    jobs = []
    for part in PARTS:
        make_folder(root / part)
        for i, sample in enumerate(getattr(split, part)):
            target = root / part / f"{i}.pt"
            if not target.is_file():
                jobs.append((root / EVENTS / sample.path, target, sample.label, time_steps, side))
    run_jobs(_make_one, jobs, ".pt files")
    write_json(path, plan.model_dump() | {"complete": True})


def _make_one(events: Path, target: Path, label: int, time_steps: int, side: int) -> None:
    frames = integrate(read_events(events, side), time_steps, side, events)  # [T, 2, H, W]
    kind = np.uint8 if frames.max() < 256 else np.int32  # torch reads no other unsigned type everywhere
    counts = torch.from_numpy(np.ascontiguousarray(frames.transpose(1, 2, 3, 0)).astype(kind))
    with whole_file(target) as partial, partial.open("wb") as file:
        torch_file.save((counts, torch.tensor([label])), file)
