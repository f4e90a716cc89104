"""The pictures: training curves of a run, firing rates of a model."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.firing import FiringRow
from utils.runlog import SUMMARY

# Colours that stay apart for colour-blind readers and in grey print (Okabe & Ito).
_BLUE, _ORANGE, _GREEN, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_STEP_COLOURS = [_BLUE, _ORANGE, _GREEN, _VERMILION]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curves(folder: Path) -> Path:
    """Draw `summary.csv` of a run into `curves.png`: losses, accuracies, learning rate over epochs."""
    with (folder / SUMMARY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = {key: [float(row[key]) for row in rows] for key in rows[0]}
    epochs = [epoch + 1 for epoch in column["epoch"]]

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    losses, accuracies, rates = figure.subplots(1, 3)
    losses.plot(epochs, column["train_loss"], color=_BLUE, label="training")
    losses.plot(epochs, column["eval_loss"], color=_VERMILION, label="evaluation")
    losses.set(title="loss", xlabel="epoch")
    losses.set_ylim(bottom=0)
    accuracies.plot(epochs, column["eval_top1"], color=_VERMILION, label="top-1")
    if "ema_top1" in column:
        accuracies.plot(epochs, column["ema_top1"], color=_GREEN, label="top-1, averaged weights")
    best = max(range(len(epochs)), key=column["eval_top1"].__getitem__)
    accuracies.plot(epochs[best], column["eval_top1"][best], "o", color=_VERMILION)
    accuracies.annotate(
        f"{column['eval_top1'][best]:.2f}",
        (epochs[best], column["eval_top1"][best]),
        textcoords="offset points",
        xytext=(-6, -14),
        ha="right",
    )
    accuracies.set(title="accuracy on held-out data (%)", xlabel="epoch")
    rates.plot(epochs, column["lr"], color=_BLUE)
    rates.set(title="learning rate", xlabel="epoch")
    rates.set_ylim(bottom=0)
    for axes in (losses, accuracies, rates):
        _plain(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False)
    if "ema_top1" in column:
        accuracies.legend(frameon=False, loc="lower right")
    target = folder / "curves.png"
    figure.savefig(target, dpi=150)
    return target


def draw_firing_rates(rows: list[FiringRow], target: Path, title: str) -> None:
    """Draw the firing rate of every spike tensor, one mark per time step and a bar for the mean."""
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.mean_rate for row in rows], color="#C9D6E2", height=0.7, label="mean over time")
    steps = len(rows[0].spikes)
    for t in range(steps):
        colour = _STEP_COLOURS[t % len(_STEP_COLOURS)]
        label = f"t = {t + 1}" if steps <= len(_STEP_COLOURS) else None
        axes.plot([row.rate[t] for row in rows], places, "o", color=colour, markersize=3.5, label=label)
    axes.set_yticks(places, [f"{row.name}   ({row.paper_name})" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(title=title, xlabel="firing rate (spikes per element and time step)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _plain(axes)
    figure.savefig(target, dpi=150)
