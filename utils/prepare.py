"""Get an event data set ready: `python -m utils.prepare cifar10-dvs --time-steps 10`.

Verifies checksums, extracts, converts to events and integrates frames, whatever of it is still to be done, and reports
the samples per class. Interrupted, it goes on where it stopped when called again. `--show N` draws N samples.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from utils.config.settings import EVENT_DATASETS
from utils.errors import UserError, run_script
from utils.events.splits import Split


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.prepare", description=__doc__, exit_on_error=True)
    parser.add_argument("dataset", choices=EVENT_DATASETS)
    parser.add_argument("--data-dir", type=Path, help="root of the data set (default: as in training)")
    parser.add_argument("--time-steps", type=int, metavar="T", help="frames per sample (default: by data set)")
    parser.add_argument(
        "--split", default="", metavar="NAME", help="cifar10-dvs, -tet: first90 (default) or random:SEED"
    )
    parser.add_argument("--download", action="store_true", help="fetch missing archives first (cifar10-dvs)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="draw N evaluation samples")
    parser.add_argument("--output", type=Path, default=Path("output/events"), help="folder of the pictures")
    args = parser.parse_args(argv)
    for option, value, least in (("--time-steps", args.time_steps, 1), ("--show", args.show, 0)):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: give {least} or more")
    # After parsing, so that a wrong option is answered at once: torch takes seconds to import.
    from utils.events.sources import SOURCES

    steps = args.time_steps or SOURCES[args.dataset].time_steps
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
    from utils.events.dataset import check_split_name, events_root
    from utils.events.files import make_frames
    from utils.events.sources import SOURCES, prepare_events
    from utils.events.tet import make_tet, open_tet

    # Through the settings, so that a split's name is checked and explained as it is in a configuration.
    cfg = config_from({"event_split": split_name}, source="--split")
    cfg = dataclasses.replace(cfg, dataset=dataset, data_dir=str(data_dir or ""))
    root, made_of = events_root(cfg), SOURCES[dataset].tet_of
    source = SOURCES[made_of or dataset]
    if made_of and any((root / "train").glob("*.pt")) and not (root / "events_np").is_dir():
        return open_tet(root), root
    check_split_name(split_name, source, dataset)
    samples = prepare_events(source, root, download=download)
    split = source.split(samples, split_name)
    if not made_of:
        make_frames(root, samples, steps, source.side, check=True)
        return split, root
    make_tet(root, split, split_name or source.splits[0], steps, source.side)
    return open_tet(root), root


def describe(dataset: str, split: Split, root: Path) -> str:
    """Samples per class and part, and the split's hash."""
    from utils.events.sources import SOURCES

    classes = SOURCES[dataset].classes
    lines = [f"{dataset} in {root}, split {split.hash}", f"{'class':14}{'train':>8}{'test':>8}"]
    counts = [[sum(s.label == label for s in part) for part in split] for label in range(len(classes))]
    lines += [f"{name:14}{train:8,}{test:8,}" for name, (train, test) in zip(classes, counts, strict=True)]
    return "\n".join([*lines, f"{'all':14}{len(split.train):8,}{len(split.test):8,}"])


def show(dataset: str, root: Path, steps: int, count: int, folder: Path) -> list[Path]:
    """Draw `count` evaluation samples, spread over the classes, as a picture and an animated GIF."""
    from utils.config.parse import config_from
    from utils.events.dataset import build_events
    from utils.events.pictures import animate_samples, draw_samples
    from utils.events.sources import SOURCES

    source = SOURCES[dataset]
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
