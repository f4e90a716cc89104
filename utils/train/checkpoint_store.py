"""The checkpoints of one run in its folder: which there are, which is the newest, which are dropped."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
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
        keep: how many epochs of history.
        decreasing: whether a smaller metric is better (losses).
    """

    def __init__(self, folder: Path, keep: int, decreasing: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.decreasing = decreasing
        # (metric, epoch), best first; travels inside each checkpoint, so that a resumed run goes on with it.
        self.history: list[tuple[float, int]] = []
        self.best: tuple[float, int] | None = None

    def _rank(self, metric: float) -> float:
        """Smaller is better. NaN, which compares with nothing, is the worst: it must not stay the best for ever."""
        if math.isnan(metric):
            return math.inf
        return metric if self.decreasing else -metric

    def save(self, state: Mapping[str, Any], epoch: int, metric: float) -> None:
        """Write the checkpoint of a finished epoch. Nothing older is removed before it is complete.

        Raises:
            UserError: it cannot be written.
        """
        if self.best is None or self._rank(metric) < self._rank(self.best[0]):
            self.best = (metric, epoch)
        ranked = sorted([*self.history, (metric, epoch)], key=lambda entry: (self._rank(entry[0]), entry[1]))
        self.history = ranked[: self.keep]
        write_checkpoint(self.folder / LAST, self._with_record(state, epoch) | {"metric": metric})
        self._settle(epoch)
        (self.folder / RECOVERY).unlink(missing_ok=True)

    def save_recovery(self, state: Mapping[str, Any], epoch: int, progress: Mapping[str, Any]) -> Path:
        """Write the state within an epoch; `progress` says where.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / RECOVERY
        write_checkpoint(path, self._with_record(state, epoch) | {"progress": dict(progress)})
        return path

    def _with_record(self, state: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        return {**state, "epoch": epoch, "history": self.history, "best": self.best}

    def refuse_branching(self, path: Path, content: Mapping[str, Any]) -> None:
        """Going on from an older checkpoint of the folder would destroy the later ones.

        Raises:
            UserError: the folder holds one that is further on.
        """
        newest = self.newest()
        if newest is not None and _position(read_checkpoint(newest)) > _position(content):
            raise UserError(
                f"checkpoint {path}: its folder holds later work ({newest.name}), which going on from here would "
                "overwrite; resume from that, or branch off into another folder with --experiment"
            )

    def newest(self) -> Path | None:
        """The file that a run continues from: the one furthest on, passing over torn ones with a warning.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        found: list[tuple[tuple[int, int], Path]] = []
        broken = []
        for path in (self.folder / RECOVERY, self.folder / LAST):
            if not path.exists():
                continue
            try:
                content = read_checkpoint(path)
            except UserError as error:
                broken.append(str(error))
                continue
            found.append((_position(content), path))
        if not found:
            # The history is older than `last`, and needed only when `last` is damaged.
            for path in sorted(self.folder.glob("checkpoint-*.pth.tar"), key=_epoch_in_name, reverse=True):
                try:
                    found.append((_position(read_checkpoint(path)), path))
                    break
                except UserError as error:
                    broken.append(str(error))
        if broken and not found:
            raise UserError("; ".join(broken) + "; no checkpoint of the run can be read: start it anew")
        for message in broken:
            logger.warning(f"warning: {message}; going on from an older one")
        return max(found)[1] if found else None

    def resume(self, content: Mapping[str, Any]) -> None:
        """Go on with the history and the best metric of a checkpoint."""
        self.history = [(float(metric), int(epoch)) for metric, epoch in content.get("history") or []]
        best = content.get("best")
        self.best = (float(best[0]), int(best[1])) if best else None

    def tidy(self, path: Path, content: Mapping[str, Any]) -> None:
        """Complete what a killed process left undone after writing `content` to `path`, and remove its scraps."""
        for scrap in self.folder.glob(".*.pth.tar.*"):
            scrap.unlink()
        if path.name == LAST:
            self._settle(int(content["epoch"]))

    def _settle(self, epoch: int) -> None:
        """Give `last`, which holds `epoch`, its further names, and drop what fell out of the history."""
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
    """How far a checkpoint is: the epoch to go on with, and the steps done in it."""
    epoch = int(content.get("epoch", -1))
    progress = content.get("progress")
    return (epoch, int(progress["steps"])) if progress else (epoch + 1, 0)


def _epoch_in_name(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-").removesuffix(".pth.tar")
    return int(digits) if digits.isdigit() else -1


def _link(source: Path, target: Path) -> None:
    """Let `target` name the same file as `source`, atomically, without writing the bytes again.

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
