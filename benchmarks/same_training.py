"""The first steps of a run on the published computation and on ours: the same data, first weights and optimizer.

    python -m benchmarks.same_training -c conf/digits/1_64_15E_t4.yml
    python -m benchmarks.same_training -c conf/cifar10/small_2_64_14E_t4.yml --steps 20 200 --out docs/results

plain: this model as the published implementation computes it (benchmarks/plain.py). In float64 both must agree: the
program ends with status 1 where a loss or a weight differs by more than 1e-6 (relative; a weight: to the largest of
its tensor). In float32 they part after some steps, since one potential within rounding of the threshold is a spike for
one and none for the other; the losses of both are drawn beside each other, so that a reader sees how little it means.
All options but --steps (in float64 and in float32) and --out are those of train.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.measure import print_json, print_table
from benchmarks.plain import PlainSDT
from utils.config.parse import parse_config
from utils.config.settings import Config
from utils.data.device_loader import Batch
from utils.data.loaders import Loaders, build_loaders
from utils.run.build import build_model, make_faster
from utils.run.distributed import Process
from utils.run.models import model_arguments
from utils.run.plot_style import BLUE, VERMILION, plain
from utils.run.precision import Precision
from utils.run.reproduce import seed_step
from utils.train.losses import make_train_loss
from utils.train.optim import make_optimizer, make_schedule

CPU = torch.device("cpu")
LARGEST = 1e-6  # in float64
Losses = list[tuple[float, float]]  # plain, ours; for each step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[20, 200], metavar=("F64", "F32"))
    parser.add_argument("--out", type=Path, help="folder for the losses as CSV and as a picture")
    args, rest = parser.parse_known_args()
    cfg = parse_config(rest, prog="train.py", description="")
    losses, models = train(cfg, torch.float64, args.steps[0])
    difference = {"loss": _largest(losses), "weights": _of_weights(*models)}
    print_table(
        ["float64", f"largest relative difference in {args.steps[0]} steps"],
        [[name, f"{value:.1e}"] for name, value in difference.items()],
    )
    losses, _ = train(cfg, torch.float32, args.steps[1])
    # The last tenth of the steps says whether one way learns more than the other; single steps differ.
    last = losses[-max(1, len(losses) // 10) :]
    means = [sum(column) / len(last) for column in zip(*last, strict=True)]
    first = next((i + 1 for i, pair in enumerate(losses) if _largest([pair]) > 1e-3), None)
    parts = f"they differ by more than 0.1% from step {first} on" if first else "no step differs by more than 0.1%"
    print(
        f"float32, mean loss of the last {len(last)} of {len(losses)} steps: "
        f"plain {means[0]:.4f}, ours {means[1]:.4f}; {parts}"
    )
    if args.out:
        write(args.out, Path(cfg.config or "run").stem, losses)
    print_json("benchmarks.same_training", {"float64": difference, "float32": {"plain": means[0], "ours": means[1]}})
    return int(max(difference.values()) > LARGEST)


def train(cfg: Config, dtype: torch.dtype, steps: int) -> tuple[Losses, tuple[nn.Module, nn.Module]]:
    """The losses of the first steps, all at the learning rate of the first epoch, and both trained models."""
    process = Process(rank=0, world_size=1, device=CPU)
    seed_step(cfg.seed)
    ours = build_model(cfg).to(dtype)
    arguments = {name: value for name, value in model_arguments(cfg).items() if name != "pretrained"}
    published = PlainSDT(**arguments).to(dtype)
    published.load_state_dict(ours.state_dict())
    ours.train()
    published.train()
    make_faster(cfg, ours, process, Precision(cfg, CPU), training=True)
    loaders = build_loaders(cfg, device=CPU)
    loss_fn = make_train_loss(cfg, mixup_active=False)
    both = []
    for model in (published, ours):
        optimizer = make_optimizer(cfg, model)
        make_schedule(cfg, optimizer, len(loaders.train))  # sets the rate of the first epoch
        both.append((model, optimizer))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x.to(dtype))[0], y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = []
    for x, y in itertools.islice(_batches(loaders), steps):
        plain_loss, our_loss = (step(*one, x, y) for one in both)
        losses.append((plain_loss, our_loss))
    return losses, (published, ours)


def _batches(loaders: Loaders) -> Iterator[Batch]:
    for epoch in itertools.count():
        loaders.set_epoch(epoch)
        yield from loaders.train


def _largest(losses: Losses) -> float:
    return max(abs(ours - theirs) / abs(theirs) for theirs, ours in losses)


def _of_weights(published: nn.Module, ours: nn.Module) -> float:
    theirs = dict(published.named_parameters())
    return max(
        float((value - theirs[name]).detach().abs().max() / theirs[name].detach().abs().max().clamp_min(1e-12))
        for name, value in ours.named_parameters()
        if not name.endswith("conv.bias")  # a BatchNorm follows: its gradient is rounding alone
    )


def write(folder: Path, name: str, losses: Losses) -> None:
    """The losses as `NAME_plain_and_ours.csv` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}_plain_and_ours.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "plain", "ours"])
        rows.writerows([i + 1, f"{a:.6f}", f"{b:.6f}"] for i, (a, b) in enumerate(losses))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (label, colour, style) in enumerate((("published computation", VERMILION, "-"), ("ours", BLUE, "--"))):
        axes.plot(
            range(1, len(losses) + 1), [pair[i] for pair in losses], style, color=colour, label=label, linewidth=1
        )
    axes.set(xlabel="step", ylabel="training loss", title=f"{name}, float32, one seed")
    axes.legend(frameon=False)
    plain(axes)
    figure.savefig(folder / f"{name}_plain_and_ours.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
