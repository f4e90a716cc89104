"""The files a training run writes into its folder: log, resolved config, summaries and TensorBoard files."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from utils.config.parse import to_yaml
from utils.config.settings import Config
from utils.errors import UserError
from utils.files import open_regular, replacing
from utils.run.console import logger
from utils.run.plugins import keep_copies

SUMMARY = "summary.csv"
SUMMARY_LINES = "summary.jsonl"
ARGS = "args.yaml"
PARTS = "parts.txt"
LOG = "log.txt"

_FLOAT_FORMAT = "{:.10g}"


class RunLog:
    """The files of one run, written by its main process.

    Args:
        folder: exists already.
        cfg: written to args.yaml, and into the TensorBoard files.
        start_epoch: rows of the summaries from this epoch on are deleted, since these epochs are run again.
        parts: how each part of the model runs, written to parts.txt.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, cfg: Config, start_epoch: int, parts: str = "") -> None:
        self.folder = folder
        self._wandb = _start_wandb(cfg, folder) if cfg.log_wandb else None  # first: the package may be missing
        self._handler = logging.FileHandler(folder / LOG, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(self._handler)
        config_text = to_yaml(cfg)
        (folder / ARGS).write_text(config_text, encoding="utf-8")
        (folder / PARTS).write_text(f"{parts}\n", encoding="utf-8")
        keep_copies(folder)
        _keep_rows_before(folder / SUMMARY, start_epoch, lambda line: line.split(",")[0])
        _keep_rows_before(folder / SUMMARY_LINES, start_epoch, lambda line: json.loads(line)["epoch"])
        self.tensorboard = SummaryWriter(str(folder), purge_step=start_epoch)
        self.tensorboard.add_text("config", f"```yaml\n{config_text}\n```", start_epoch)

    def epoch(self, row: dict[str, Any], extras: dict[str, float]) -> None:
        """Append one epoch to the summaries and the TensorBoard files; `row` starts with the epoch.

        `extras` (speeds, firing rates) are not in the summaries, nor are times: a run that was interrupted and
        resumed has the same summaries as one that was not.
        """
        path = self.folder / SUMMARY
        new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(row)
            writer.writerow(_FLOAT_FORMAT.format(v) if isinstance(v, float) else v for v in row.values())
        with (self.folder / SUMMARY_LINES).open("a") as file:
            file.write(json.dumps(row) + "\n")
        scalars = {name.replace("_", "/", 1): value for name, value in row.items() if name != "epoch"} | extras
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, row["epoch"])
        self.tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["epoch"])

    def picture(self, name: str, file: Path) -> None:
        """Show a picture of the run's folder in TensorBoard."""
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))  # [H, W, 3]
        self.tensorboard.add_image(name, pixels, dataformats="HWC")

    def close(self) -> None:
        self.tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        logger.removeHandler(self._handler)
        self._handler.close()


def _start_wandb(cfg: Config, folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log_wandb: the package wandb cannot be imported ({error}); pip install wandb") from error
    return wandb.init(project="spike-driven-transformer", name=folder.name, dir=str(folder), config=cfg.as_dict())


def _keep_rows_before(path: Path, epoch: int, epoch_of: Callable[[str], Any]) -> None:
    """Delete the lines of a summary from `epoch` on, and a last line that a killed process did not finish."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8", "surrogateescape").splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept, odd = [], 0
    for line in lines:
        try:
            known = 0 <= int(epoch_of(line)) < epoch
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            known = line.startswith("epoch,") and epoch > 0  # the header
            odd += not line.startswith("epoch,") and line.endswith("\n")
        if known and line.endswith("\n"):
            kept.append(line)
    if odd:
        logger.warning(f"warning: {path}: {odd} line(s) are no rows of a run and are deleted")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8", errors="surrogateescape", newline="")
