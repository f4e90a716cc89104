"""The checkpoints in the folder of one run: writing them, finding the newest, deleting old ones."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import replacing
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.console import logger

LAST = "last.pth.tar"
BEST = "model_best.pth.tar"
RECOVERY = "recovery.pth.tar"


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

    def refuse_older(self, path: Path, content: Mapping[str, Any]) -> None:
        """Check that `path` is the newest checkpoint here: continuing from an older one would overwrite later ones.

        Raises:
            UserError: the folder holds a newer one.
        """
        newest = self.newest()
        if newest is not None and _position(read_checkpoint(newest)) > _position(content):
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
                    yield _position(read_checkpoint(path)), path
                except UserError as error:
                    broken.append(str(error))

        latest = (path for path in (self.folder / RECOVERY, self.folder / LAST) if path.exists())
        # Those of single epochs are older than `last`, and needed only when `last` is damaged.
        older = sorted(self.folder.glob("checkpoint-*.pth.tar"), key=_epoch_in_name, reverse=True)
        found = max(readable(latest), default=None) or next(readable(older), None)
        if broken and found is None:
            raise UserError("; ".join(broken) + "; no checkpoint of the run can be read; start the run again")
        for message in broken:
            logger.warning(f"warning: {message}; an older one is used")
        return found[1] if found else None

    def resume(self, content: Mapping[str, Any]) -> None:
        """Take over the history and the best metric of a checkpoint."""
        self.history = [(float(metric), int(epoch)) for metric, epoch in content.get("history") or []]
        best = content.get("best")
        self.best = (float(best[0]), int(best[1])) if best else None

    def clean_up(self, path: Path, content: Mapping[str, Any]) -> None:
        """Delete the unfinished files of a killed process, and do what it had to do after writing `content`."""
        for unfinished in self.folder.glob(".*.pth.tar.*"):
            unfinished.unlink()
        if path.name == LAST:
            self._update_names(int(content["epoch"]))

    def _update_names(self, epoch: int) -> None:
        """Link `last`, which holds `epoch`, under its other names, and delete the epochs that are not kept."""
        last = self.folder / LAST
        epochs = {kept for _, kept in self.history}
        if epoch in epochs:
            _link(last, self.folder / f"checkpoint-{epoch}.pth.tar")
        if self.best is not None and self.best[1] == epoch:
            _link(last, self.folder / BEST)
        for path in self.folder.glob("checkpoint-*.pth.tar"):
            if _epoch_in_name(path) not in epochs:
                path.unlink()


def _position(content: Mapping[str, Any]) -> tuple[int, int]:
    """How far a checkpoint is: the epoch to continue, and the steps done in it."""
    epoch = int(content.get("epoch", -1))
    progress = content.get("progress")
    return (epoch, int(progress["steps"])) if progress else (epoch + 1, 0)


def _epoch_in_name(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-").removesuffix(".pth.tar")
    return int(digits) if digits.isdigit() else -1


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
