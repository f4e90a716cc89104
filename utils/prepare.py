"""Get an event data set ready: `python -m utils.prepare cifar10-dvs --time-steps 10`.

Verifies checksums, extracts, converts to events and integrates frames, whatever of it is still to be done, and reports
the samples per class. Interrupted, it goes on where it stopped when called again. `--show N` draws N samples.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.settings import EVENT_DATASETS
from utils.errors import UserError, run_script

if TYPE_CHECKING:
    from utils.events.splits import Split

_DEFAULT_STEPS = {"digits-dvs": 5, "gesture": 16}  # of the configurations; else 10


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.prepare", description=__doc__, exit_on_error=True)
    parser.add_argument("dataset", choices=EVENT_DATASETS)
    parser.add_argument("--data-dir", type=Path, help="root of the data set (default: as in training)")
    parser.add_argument("--time-steps", type=int, metavar="T", help="frames per sample (default: 10; by data set)")
    parser.add_argument(
        "--split", default="", metavar="NAME", help="cifar10-dvs, -tet: first90 (default) or random:SEED"
    )
    parser.add_argument("--download", action="store_true", help="fetch missing archives first (cifar10-dvs)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="draw N evaluation samples")
    parser.add_argument("--output", type=Path, default=Path("output/events"), help="folder of the pictures")
    args = parser.parse_args(argv)
    steps = args.time_steps or _DEFAULT_STEPS.get(args.dataset, 10)
    if steps < 1 or args.show < 0:
        raise UserError(f"--time-steps {steps}, --show {args.show}: both count from 1")
    # After parsing, so that a wrong option is answered at once: torch takes seconds to import.
    split, root = prepare(args.dataset, args.data_dir, steps, args.split, download=args.download)
    print(describe(args.dataset, split, root))
    if args.show:
        for path in show(args.dataset, root, steps, args.show, args.output):
            print(f"drawn: {path}")
    return 0


def prepare(
    dataset: str, data_dir: Path | None, steps: int, split_name: str, *, download: bool = False
) -> tuple[Split, Path]:
    """Bring all files of `dataset` to completion, up to the frames of `steps` time steps; its split and root.

    Raises:
        UserError: files are missing, damaged or do not fit together.
    """
    from utils.config.parse import config_from
    from utils.events.dataset import event_source, events_root, make_digits_dvs
    from utils.events.files import make_frames
    from utils.events.sources import prepare_events
    from utils.events.splits import split_by_folder, split_by_name
    from utils.events.tet import make_tet, open_tet

    # Through the settings, so that a split's name is checked and explained as it is in a configuration.
    cfg = config_from({"event_split": split_name}, source="--split")
    cfg = dataclasses.replace(cfg, dataset=dataset, data_dir=str(data_dir or ""))
    root, source = events_root(cfg), event_source(dataset)
    if dataset == "cifar10-dvs-tet" and any((root / "train").glob("*.pt")) and not (root / "events_np").is_dir():
        return open_tet(root), root
    if dataset == "digits-dvs":
        make_digits_dvs(root)
    samples = prepare_events(source, root, download=download and dataset != "digits-dvs")
    if source.parts:
        split = split_by_folder(samples, source.classes)
    elif split_name == "tet":
        raise UserError("--split: 'tet' is what the .pt files bring; give first90 or random:SEED to make them")
    else:
        split = split_by_name(samples, source.classes, split_name or "first90")
    if dataset == "cifar10-dvs-tet":
        make_tet(root, split, split_name or "first90", steps, source.side)
        split = open_tet(root)
    else:
        make_frames(root, samples, steps, source.side, check=True)
    return split, root


def describe(dataset: str, split: Split, root: Path) -> str:
    """Samples per class and part, and the split's hash."""
    from utils.events.dataset import event_source

    classes = event_source(dataset).classes
    lines = [f"{dataset} in {root}, split {split.hash}", f"{'class':14}{'train':>8}{'test':>8}"]
    counts = [[sum(s.label == label for s in part) for part in split] for label in range(len(classes))]
    lines += [f"{name:14}{train:8,}{test:8,}" for name, (train, test) in zip(classes, counts, strict=True)]
    return "\n".join([*lines, f"{'all':14}{len(split.train):8,}{len(split.test):8,}"])


def show(dataset: str, root: Path, steps: int, count: int, folder: Path) -> list[Path]:
    """Draw `count` evaluation samples, spread over the classes, as a picture and an animated GIF."""
    from utils.config.parse import config_from
    from utils.events.dataset import build_events, event_source
    from utils.events.pictures import animate_samples, draw_samples

    source = event_source(dataset)
    cfg = config_from({"dataset": dataset, "data_dir": str(root), "time_steps": steps})
    data = build_events(cfg, (2, source.side, source.side), training=False)
    chosen = [round(i * (len(data) - 1) / max(count - 1, 1)) for i in range(min(count, len(data)))]
    samples = [(data[i][0].numpy(), source.classes[data[i][1]]) for i in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    picture, film = folder / f"{dataset}.png", folder / f"{dataset}.gif"
    draw_samples(samples, picture, f"{dataset}, T = {steps}")
    animate_samples(samples, film)
    return [picture, film]


if __name__ == "__main__":
    run_script(main)
