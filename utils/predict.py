"""What a trained network says of images or event files: `python -m utils.predict CHECKPOINT FILES ...`.

For each file the most likely classes, the mean firing rate, and the operations and energy of this one sample. Files are
images, folders of images, or, for a network trained on events, `.npz` files with t, x, y, p. Further options are those
of firing_num.py: -c, --time-steps, --device, --energy-cost, ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.parse import parse_config
from utils.config.settings import MEASURE
from utils.errors import UserError, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from utils.config.settings import Config
    from utils.measure.measurement import Measurement

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
EVENTS = (".npz",)


@dataclass(frozen=True)
class Prediction:
    """What the network says of one file, and what that took."""

    file: str
    classes: list[tuple[str, float]]  # name and probability, the most likely first
    firing_rate: float | None  # mean over all spike tensors
    additions: float
    multiplications: float  # multiply-accumulates
    energy_uJ: float

    def __str__(self) -> str:
        classes = ", ".join(f"{name} {probability:.1%}" for name, probability in self.classes)
        rate = "" if self.firing_rate is None else f"firing rate {self.firing_rate:.4f}, "
        return (
            f"{self.file}: {classes}\n  {rate}{self.additions:,.0f} additions, {self.multiplications:,.0f} "
            f"multiply-accumulates, {self.energy_uJ:.3f} µJ"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="file of train.py, or a folder of utils.export --to hub")
    parser.add_argument("files", nargs="+", help="images, folders of images, or event files")
    parser.add_argument("--top", type=int, default=5, help="classes to show (default: 5)")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, one per line")
    parser.add_argument("--maps", type=Path, metavar="FILE.png", help="draw the attention maps of all files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, settings = parser.parse_known_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: give 1 or more")
    # After parsing, so that a wrong option is answered at once: torch takes seconds to import.
    from utils.run.checkpoint import settings_inside

    cfg = parse_config(["--resume", args.checkpoint, *settings], prog=MEASURE, description="", inside=settings_inside)
    found = list(predict(cfg, args.files, top=args.top, names=args.class_names, maps=args.maps))
    if args.json:
        print(json.dumps([asdict(prediction) for prediction in found], indent=2))
        return 0
    for prediction in found:
        print(prediction)
    if args.maps:
        print(f"drawn: {args.maps}")
    return 0


def predict(cfg: Config, files: list[str], *, top: int, names: Path | None, maps: Path | None) -> Iterator[Prediction]:
    """A prediction for each file; with `maps`, their attention maps as a picture.

    Raises:
        UserError: a file that is missing or of the wrong kind, or whatever a measurement refuses.
    """
    import torch

    import model as models  # noqa: F401 -- registers the models
    from utils.measure.measurement import Measurement
    from utils.report.attention_picture import picture_of_samples
    from utils.run.distributed import Place, Process, choose_device
    from utils.run.plugins import import_plugins

    import_plugins(cfg.plugin)
    measurement = Measurement(cfg, Process(0, 1, choose_device(cfg.device, Place(0, 1, 0, 1))))
    paths = listed_files(files, EVENTS if measurement.events else IMAGES)
    samples = [read_sample(measurement, path) for path in paths]
    classes = class_names(cfg, names)
    for path, x in zip(paths, samples, strict=True):
        with torch.no_grad():
            logits, _hook = measurement.model(x)
        likely = (logits.mean(dim=0) if logits.dim() == 3 else logits)[0].softmax(0).topk(min(top, cfg.num_classes))
        measured = measurement.measure([(x, torch.zeros(1, dtype=torch.long, device=x.device))])
        yield Prediction(
            file=str(path),
            classes=[
                (classes[index] if classes else f"class {index}", value)
                for value, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
            ],
            firing_rate=measured.mean_firing_rate,
            additions=measured.energy.operations("AC"),
            multiplications=measured.energy.operations("MAC"),
            energy_uJ=measured.energy.total_mJ * 1000,
        )
    if maps:
        titles = [path.name for path in paths]
        picture = picture_of_samples(measurement, torch.cat(samples), titles)
        if picture is None:
            raise UserError(f"--maps: model {cfg.model} computes no spike tensors known as V_S and masked V_S")
        maps.parent.mkdir(parents=True, exist_ok=True)
        maps.write_bytes(picture.light)


def listed_files(given: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files, those of a folder in the order of their names.

    Raises:
        UserError: a name that does not exist, or a folder without such files.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        if not inside:
            raise UserError(f"{name}: no file in this folder ends in {', '.join(suffixes)}")
        found += inside
    return found


def read_sample(measurement: Measurement, path: Path) -> Tensor:
    """A file as the evaluation gives it to the network: `[1, C, H, W]`, or event frames `[1, T, 2, H, W]`.

    Raises:
        UserError: it is missing, damaged or of the other kind.
    """
    if measurement.events:
        from utils.events.dataset import read_sample_file

        return read_sample_file(measurement.cfg, path, measurement.data.eval_size).to(measurement.process.device)
    from utils.report.attention_picture import read_images

    return read_images([str(path)], measurement.data, measurement.process.device)


def class_names(cfg: Config, file: Path | None) -> list[str] | None:
    """A name for each class: from the file, else from the data set if it is known or at hand, else None.

    Raises:
        UserError: the file cannot be read, or has another number of names.
    """
    from utils.data.datasets import names_of_classes

    if file is None:
        found = names_of_classes(cfg)
        return found if found and len(found) == cfg.num_classes else None
    try:
        found = file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {file}: cannot be read ({error})") from error
    if len(found) != cfg.num_classes:
        raise UserError(f"--class-names {file}: {len(found)} lines for {cfg.num_classes} classes; give one for each")
    return found


if __name__ == "__main__":
    run_script(main)
