"""The event data sets: what is known of each, and the way from its archives to its event files.

A new set is one more entry of `SOURCES`, and its name in `utils.config.settings.EVENT_DATASETS`.

The folder tree is SpikingJelly's: `download/` (archives), `extract/`, `events_np/`. `prepared.json` beside them holds
the number of samples per class once all of them were converted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils import ROOT
from utils.errors import UserError, shortened
from utils.events import digits
from utils.events.aedat import read_cifar10_dvs, read_gesture, read_gesture_labels
from utils.events.download import check_archives, extract, fetch
from utils.events.files import (
    EVENTS,
    is_whole,
    list_samples,
    make_folder,
    read_record,
    run_jobs,
    spikingjelly_datasets,
    write_events,
    write_json,
)
from utils.events.splits import Split, split_by_folder, split_by_name
from utils.schema import Count, Record, Text

MANIFEST = "prepared.json"
# Class folders in SpikingJelly's order, sorted as text: class index 2 is the folder '10'. Published weights need it.
_GESTURES = sorted(str(label) for label in range(11))

_Jobs = tuple[Callable[..., None], list[tuple[Any, ...]], str]  # for `run_jobs`


class _Prepared(Record):
    """The file MANIFEST: how many samples each folder has."""

    dataset: Text
    samples: dict[Text, Count]


@dataclass(frozen=True)
class EventSource:
    """What is known of one event data set."""

    name: str
    side: int  # pixels of the square sensor
    classes: list[str]  # folder names by class index
    root: str  # its folder if data_dir is not given
    image_size: int  # pixels that the model gets, if img_size is not given
    parts: tuple[str, ...] = ()  # ('train', 'test') where the set brings its split
    splits: tuple[str, ...] = ()  # what event_split may name; the first one is the default
    total: dict[str, int] = field(default_factory=dict)  # samples by part ('' without parts), as published
    time_steps: int = 10  # of the configurations
    reader: str = ""  # module and class in spikingjelly.datasets that have the archives and their checksums
    paper: str = ""
    jobs: Callable[[EventSource, Path], _Jobs] | None = None  # how extracted recordings become event files
    make: Callable[[Path], None] | None = None  # makes all event files instead, without a download
    tet_of: str = ""  # its samples are `.pt` files (utils.events.tet), made from the events of this set

    @property
    def folders(self) -> list[str]:
        """Folders of samples below events_np."""
        return [f"{part}/{name}" for part in self.parts for name in self.classes] if self.parts else self.classes

    def split(self, samples: dict[str, list[str]], name: str = "") -> Split:
        """Which of `samples` train and which evaluate; `name` as in `splits`, empty for the default."""
        if self.parts:
            return split_by_folder(samples, self.classes)
        return split_by_name(samples, self.classes, name or self.splits[0])

    def archives(self) -> list[tuple[str, str, str]]:
        """Name, address and MD5 of each file to download, as SpikingJelly has them."""
        found: list[tuple[str, str, str]] = self._reader().resource_url_md5()
        return found

    def downloadable(self) -> bool:
        """Whether their host lets programs fetch them, as SpikingJelly has it."""
        return bool(self._reader().downloadable())

    def _reader(self) -> Any:
        spikingjelly_datasets()  # first, with its warnings silenced
        module, name = self.reader.split(".")
        return getattr(importlib.import_module(f"spikingjelly.datasets.{module}"), name)


def event_samples(source: EventSource, root: Path) -> dict[str, list[str]]:
    """Folder -> event files, complete.

    Raises:
        UserError: nothing was prepared yet, a class is empty, or samples are missing.
    """
    if not (root / EVENTS).is_dir():
        raise UserError(what_to_do(source, root))
    samples = list_samples(root / EVENTS, source.folders)
    check_complete(source, root, root / EVENTS, samples)
    return samples


def check_complete(source: EventSource, root: Path, folder: Path, samples: dict[str, list[str]]) -> None:
    """UserError unless `samples`, found in `folder`, are all of the set."""
    remedy = f"finish it with python -m utils.prepare {source.name}"
    for name, files in samples.items():
        if not files:
            raise UserError(f"class folder {folder / name} holds no samples; {remedy}")
    manifest = root / MANIFEST
    if manifest.is_file():
        prepared = read_record(_Prepared, manifest)
        assert prepared is not None  # it is a file
        if prepared.dataset != source.name:
            raise UserError(f"{manifest}: dataset is {shortened(prepared.dataset)}, expected {source.name!r}; {remedy}")
        expected = prepared.samples
        for name, files in samples.items():
            if len(files) != expected.get(name):
                raise UserError(f"{folder / name} holds {len(files)} of {expected.get(name)} samples; {remedy}")
        return
    for part, total in source.total.items():
        count = sum(len(files) for name, files in samples.items() if name.startswith(part))
        if count != total:
            raise UserError(f"{folder / part} holds {count:,} samples, the published set {total:,}; {remedy}")


def what_to_do(source: EventSource, root: Path) -> str:
    """A message that lists the files to download, with address and checksum, and says where to put them."""
    lines = [f"{root}: no files of {source.name} ({source.paper}). Download into {root / 'download'}:"]
    lines += [f"    {name:20} MD5 {md5}  {url}" for name, url, md5 in source.archives()]
    return "\n".join([*lines, f"  then run: python -m utils.prepare {source.name} --data-dir {root}"])


def prepare_events(source: EventSource, root: Path, *, download: bool = False) -> dict[str, list[str]]:
    """Make the event files that are missing in `events_np`, from `download/` or `extract/`; returns all samples.

    download: first fetch the archives that are missing, where their host allows programs to do so

    Raises:
        UserError: an archive or a recording is missing or damaged; files that were converted before stay.
    """
    if source.make is not None:
        source.make(root)
        return event_samples(source, root)
    try:
        return event_samples(source, root)
    except UserError:
        if not download and not (root / "download").is_dir() and not (root / "extract").is_dir():
            raise
    if download and not source.downloadable():
        raise UserError(f"{source.name} cannot be downloaded by a program. {what_to_do(source, root)}")
    if download:
        fetch(source.archives(), root / "download")
    if (root / "download").is_dir():
        check_archives(source.archives(), root / "download")
        for name, _, _ in source.archives():
            extract(root / "download" / name, root / "extract")
    for folder in source.folders:
        make_folder(root / EVENTS / folder)
    assert source.jobs is not None, source.name
    run_jobs(*source.jobs(source, root))
    samples = list_samples(root / EVENTS, source.folders)
    if (root / "download").is_dir():
        # Made from verified archives: these are all samples, whatever their number.
        counts = {folder: len(files) for folder, files in samples.items()}
        write_json(root / MANIFEST, {"dataset": source.name, "samples": counts})
    check_complete(source, root, root / EVENTS, samples)
    return samples


def _cifar10_dvs_jobs(source: EventSource, root: Path) -> _Jobs:
    jobs = []
    for name in source.classes:
        recordings = sorted((root / "extract" / name).glob("*.aedat"))
        if not recordings:
            raise UserError(f"class folder {root / 'extract' / name} holds no recordings; extract its archive again")
        targets = [(path, root / EVENTS / name / f"{path.stem}.npz") for path in recordings]
        jobs += [(path, target) for path, target in targets if not is_whole(target, "p")]
    return _convert_cifar10_dvs, jobs, "events"


def _convert_cifar10_dvs(recording: Path, target: Path) -> None:
    write_events(target, read_cifar10_dvs(recording))


def _gesture_jobs(source: EventSource, root: Path) -> _Jobs:
    folder = root / "extract" / "DvsGesture"
    jobs = []
    for part in source.parts:
        listing = folder / f"trials_to_{part}.txt"
        if not listing.is_file():
            raise UserError(f"{listing} does not exist; extract DvsGesture.tar.gz again")
        for name in filter(None, map(str.strip, listing.read_text().splitlines())):
            recording = folder / name
            pieces = gesture_pieces(recording, root / EVENTS / part)
            if not all(is_whole(target, "p") for target, _, _ in pieces):
                jobs.append((recording, pieces))
    return _convert_gesture, jobs, "recordings"


def gesture_pieces(recording: Path, target: Path) -> list[tuple[Path, int, int]]:
    """The samples in a recording, by its list of labels: event file, start and end in microseconds.

    Names and numbers are SpikingJelly's: classes count from 0, and samples of one class in one recording too.
    """
    labels = read_gesture_labels(recording.with_name(f"{recording.stem}_labels.csv"))
    seen = [0] * len(_GESTURES)
    pieces = []
    for label, start, end in labels.tolist():
        pieces.append((target / str(label - 1) / f"{recording.stem}_{seen[label - 1]}.npz", start, end))
        seen[label - 1] += 1
    return pieces


def _convert_gesture(recording: Path, pieces: list[tuple[Path, int, int]]) -> None:
    events = read_gesture(recording)
    for target, start, end in pieces:
        inside = (events["t"] >= start) & (events["t"] < end)
        if not inside.any():
            raise UserError(f"{recording} has no events from {start} to {end} us ({target.name}); it is truncated")
        write_events(target, {key: values[inside] for key, values in events.items()})


_CIFAR10_DVS = EventSource(
    name="cifar10-dvs",
    side=128,
    classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    root="data/cifar10-dvs",
    image_size=64,
    splits=("first90", "random"),
    total={"": 10_000},
    reader="cifar10_dvs.CIFAR10DVS",
    paper="Li et al., Frontiers in Neuroscience 11:309, 2017",
    jobs=_cifar10_dvs_jobs,
)
_DIGITS_DVS = EventSource(
    name="digits-dvs",
    side=digits.SIDE,
    classes=[str(label) for label in range(10)],
    root=str(ROOT / "data" / "digits-dvs"),
    image_size=digits.SIDE,
    parts=("train", "test"),
    time_steps=5,
    make=digits.complete,
)
_GESTURE = EventSource(
    name="gesture",
    side=128,
    classes=_GESTURES,
    root="data/DVSGesturedataset",
    image_size=128,
    parts=("train", "test"),
    total={"train": 1176, "test": 288},
    time_steps=16,
    reader="dvs128_gesture.DVS128Gesture",
    paper="Amir et al., CVPR 2017; about 3 GB to download and 5 GB extracted",
    jobs=_gesture_jobs,
)
_CIFAR10_DVS_TET = replace(_CIFAR10_DVS, name="cifar10-dvs-tet", splits=("tet",), tet_of=_CIFAR10_DVS.name)
SOURCES = {source.name: source for source in (_DIGITS_DVS, _CIFAR10_DVS, _CIFAR10_DVS_TET, _GESTURE)}
