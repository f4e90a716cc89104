"""The curves of a training run as one picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.figure import Figure

from utils.errors import UserError, first_line, shortened
from utils.files import read_text
from utils.run.plot_style import BLUE, GREEN, VERMILION, plain
from utils.schema import MOST
from utils.train.run_files import SUMMARY


def drawn(folder: Path) -> str:
    """Draw the curves of a run, and say where they are, or why there are none: its result does not depend on them."""
    try:
        return f"curves in {draw_curves(folder)}"
    except (OSError, UserError) as error:
        return f"no curves: {error}"


def _columns(path: Path) -> dict[str, list[float]]:
    """The columns of a summary.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
        column = {key: [float(row[key]) for row in rows] for key in rows[0]}
        if not column.keys() >= {"epoch", "lr", "train_loss", "eval_loss", "eval_top1"}:
            raise ValueError(f"its first line is {shortened(list(column))}")
        if not all(0 <= epoch < MOST for epoch in column["epoch"]):
            raise ValueError("an epoch is no number from 0 on")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist any more") from error
    except (OSError, ValueError, TypeError, IndexError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} does not hold the rows of a run ({first_line(error)})") from error
    return column


def draw_curves(folder: Path) -> Path:
    """Draw `summary.csv` of a run into `curves.png`: losses, accuracies, learning rate over epochs.

    Raises:
        UserError: there is no such file, or it holds something else.
        OSError: the picture cannot be written.
    """
    column = _columns(folder / SUMMARY)
    epochs = [epoch + 1 for epoch in column["epoch"]]

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    losses, accuracies, rates = figure.subplots(1, 3)
    losses.plot(epochs, column["train_loss"], color=BLUE, label="training")
    losses.plot(epochs, column["eval_loss"], color=VERMILION, label="evaluation")
    losses.set(title="loss", xlabel="epoch")
    losses.set_ylim(bottom=0)
    accuracies.plot(epochs, column["eval_top1"], color=VERMILION, label="top-1")
    if "ema_top1" in column:
        accuracies.plot(epochs, column["ema_top1"], color=GREEN, label="top-1, averaged weights")
    best = max(range(len(epochs)), key=column["eval_top1"].__getitem__)
    accuracies.plot(epochs[best], column["eval_top1"][best], "o", color=VERMILION)
    accuracies.annotate(
        f"{column['eval_top1'][best]:.2f}",
        (epochs[best], column["eval_top1"][best]),
        textcoords="offset points",
        xytext=(-6, -14),
        ha="right",
    )
    accuracies.set(title="accuracy on held-out data (%)", xlabel="epoch")
    rates.plot(epochs, column["lr"], color=BLUE)
    rates.set(title="learning rate", xlabel="epoch")
    rates.set_ylim(bottom=0)
    for axes in (losses, accuracies, rates):
        plain(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False)
    if "ema_top1" in column:
        accuracies.legend(frameon=False, loc="lower right")
    target = folder / "curves.png"
    figure.savefig(target, dpi=150)
    return target
