"""The checkpoints in the folder of one run: writing them, finding the newest, deleting old ones."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import replacing
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.console import logger
from utils.train.saved_state import SavedState, saved_state

LAST = "last.pth.tar"
BEST = "model_best.pth.tar"
RECOVERY = "recovery.pth.tar"
_OF_EPOCH = re.compile(r"checkpoint-([0-9]{1,12})\.pth\.tar")


class CheckpointStore:
    """`last` and `model_best`, the best `keep` epochs as `checkpoint-<epoch>`, and `recovery` within an epoch.

    Args:
        folder: where they are written.
        keep: how many of the best epochs are kept.
        decreasing: whether a smaller metric is better, as it is for a loss.
    """

    def __init__(self, folder: Path, keep: int, decreasing: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.decreasing = decreasing
        # (metric, epoch), best first. It is part of each checkpoint, so that a resumed run continues it.
        self.history: list[tuple[float, int]] = []
        self.best: tuple[float, int] | None = None

    def _rank(self, metric: float) -> float:
        """A key of which smaller is better. NaN counts as the worst: no later metric would be better than it."""
        if math.isnan(metric):
            return math.inf
        return metric if self.decreasing else -metric

    def save(self, state: Mapping[str, Any], epoch: int, metric: float) -> None:
        """Write the checkpoint of a finished epoch, then delete those that are no longer among the best.

        Raises:
            UserError: it cannot be written.
        """
        if self.best is None or self._rank(metric) < self._rank(self.best[0]):
            self.best = (metric, epoch)
        ranked = sorted([*self.history, (metric, epoch)], key=lambda entry: (self._rank(entry[0]), entry[1]))
        self.history = ranked[: self.keep]
        write_checkpoint(self.folder / LAST, self._with_record(state, epoch) | {"metric": metric})
        self._update_names(epoch)
        (self.folder / RECOVERY).unlink(missing_ok=True)

    def save_recovery(self, state: Mapping[str, Any], epoch: int, progress: Mapping[str, Any]) -> Path:
        """Write the state within an epoch; `progress` says how far the epoch is.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / RECOVERY
        write_checkpoint(path, self._with_record(state, epoch) | {"progress": dict(progress)})
        return path

    def _with_record(self, state: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        return {**state, "epoch": epoch, "history": self.history, "best": self.best}

    def refuse_older(self, path: Path, saved: SavedState) -> None:
        """Check that `path` is the newest checkpoint here: continuing from an older one would overwrite later ones.

        Raises:
            UserError: the folder holds a newer one.
        """
        newest = self.newest()
        if newest is not None and _read(newest).position > saved.position:
            raise UserError(
                f"checkpoint {path}: its folder holds a later one ({newest.name}), which this run would overwrite; "
                "resume from that one, or write to another folder with --experiment"
            )

    def newest(self) -> Path | None:
        """The newest checkpoint that can be read; None if there is no file. Files that cannot be read are warned of.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        broken: list[str] = []

        def readable(paths: Iterable[Path]) -> Iterator[tuple[tuple[int, int], Path]]:
            for path in paths:
                try:
                    yield _read(path).position, path
                except UserError as error:
                    broken.append(str(error))

        latest = (path for path in (self.folder / RECOVERY, self.folder / LAST) if path.exists())
        # Those of single epochs are older than `last`, and needed only when `last` is damaged.
        older = (path for path, _ in self._of_epochs())
        found = max(readable(latest), default=None) or next(readable(older), None)
        if broken and found is None:
            raise UserError("; ".join(broken) + "; no checkpoint of the run can be read; start the run again")
        for message in broken:
            logger.warning(f"warning: {message}; an older one is used")
        return found[1] if found else None

    def resume(self, saved: SavedState) -> None:
        """Take over the history and the best metric of a checkpoint."""
        self.history, self.best = list(saved.history or []), saved.best

    def finish_saving(self, path: Path, saved: SavedState) -> None:
        """Do what a process that was killed had to do after writing the checkpoint `path`."""
        if path.name == LAST:
            self._update_names(saved.epoch)

    def _update_names(self, epoch: int) -> None:
        """Link `last`, which holds `epoch`, under its other names, and delete the epochs that are not kept."""
        last = self.folder / LAST
        epochs = {kept for _, kept in self.history}
        if epoch in epochs:
            _link(last, self.folder / f"checkpoint-{epoch}.pth.tar")
        if self.best is not None and self.best[1] == epoch:
            _link(last, self.folder / BEST)
        for path, epoch in self._of_epochs():
            if epoch not in epochs:
                path.unlink()

    def _of_epochs(self) -> list[tuple[Path, int]]:
        """The checkpoints of single epochs, newest first; files of other names are the user's own."""
        names = ((path, _OF_EPOCH.fullmatch(path.name)) for path in self.folder.glob("checkpoint-*.pth.tar"))
        found = [(path, int(match[1])) for path, match in names if match and path.is_file()]
        return sorted(found, key=lambda entry: -entry[1])


def _read(path: Path) -> SavedState:
    return saved_state(read_checkpoint(path, say=False), path)


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, atomically and without writing the bytes again.

    Raises:
        UserError: that cannot be written; `target` is untouched.
    """
    try:
        with replacing(target, durable=True) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)  # a file system without hard links
    except OSError as error:
        raise UserError(f"cannot write checkpoint {target}: {error}; {source} is complete") from error
