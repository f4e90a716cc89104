"""Hand a trained model on: `python -m utils.export CHECKPOINT --to onnx`.

Writes the model of a checkpoint as a torch.export program (pt2), as ONNX, as safetensors or as a folder that timm
reads (hub), loads it back, and compares its logits and predictions with the checkpoint's on samples of the evaluation
data. BatchNorm is folded into the convolutions in pt2 and ONNX. Further options are those of firing_num.py: -c,
--data-dir, --use-ema, ...
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.parse import parse_config
from utils.config.settings import MEASURE
from utils.errors import UserError, first_line, listed, run_script

if TYPE_CHECKING:
    from torch import Tensor, nn

    from utils.config.settings import Config
    from utils.run.export_formats import Run

KINDS = ("pt2", "onnx", "safetensors", "hub")
# A potential this near to its threshold, relative to the largest one of its layer, may be rounded to either side of it:
# some 80 roundings of float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Agreement:
    """An exported model beside the one it was made of."""

    samples: int
    difference: float  # largest, of logits
    largest: float  # logit
    flipped: list[int]  # samples whose prediction differs
    near: list[int]  # of those, the ones with a potential within rounding of its threshold

    @property
    def agrees(self) -> bool:
        """Whether rounding explains every difference."""
        return set(self.flipped) == set(self.near)

    def __str__(self) -> str:
        text = (
            f"{self.samples} samples: largest difference of logits {self.difference:.1e} (largest logit "
            f"{self.largest:.1f}), {len(self.flipped)} predictions differ"
        )
        if self.flipped:
            other = [str(i) for i in self.flipped if i not in self.near]
            text += f"; in {len(self.near)} of these samples a potential lay within rounding of its threshold"
            text += f", in others not: samples {listed(other)}" if other else ""
        return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="file of train.py")
    parser.add_argument(
        "--to", action="append", required=True, metavar="FORMAT", help=f"{', '.join(KINDS)}; repeatable"
    )
    parser.add_argument("--into", type=Path, help="folder (default: output/export/NAME OF THE CHECKPOINT'S FOLDER)")
    parser.add_argument("--samples", type=int, default=64, help="samples to compare on (default: 64)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="hub: a report.json of this checkpoint, for the card"
    )
    parser.add_argument("--upload", metavar="USER/NAME", help="hub: upload the folder to the Hugging Face hub")
    parser.add_argument("--keep-batchnorm", action="store_true", help="do not fold BatchNorm")
    args, settings = parser.parse_known_args(argv)
    if args.upload and "hub" not in args.to:
        raise UserError("--upload: uploads what --to hub writes; add --to hub")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: give 1 or more")
    # After parsing, so that a wrong option is answered at once: torch takes seconds to import.
    from utils.run.export_formats import FORMATS, REFUSED

    for kind in args.to:
        if kind in REFUSED:
            raise UserError(f"--to {kind}: {REFUSED[kind]}")
        if kind not in FORMATS:
            raise UserError(f"--to {kind}: unknown; valid: {', '.join(FORMATS)}")
        FORMATS[kind].check()
    from utils.run.checkpoint import settings_inside

    cfg = parse_config(["--resume", args.checkpoint, *settings], prog=MEASURE, description="", inside=settings_inside)
    folder = args.into or Path("output/export") / Path(args.checkpoint).resolve().parent.name
    report = report_of(args.report, cfg) if args.report else None
    status = export(cfg, args.to, folder, samples=args.samples, fold=not args.keep_batchnorm, report=report)
    if args.upload and not status:
        from utils.run.model_folder import upload

        print(f"uploaded: {upload(path_of(folder, cfg, FORMATS['hub'].suffix), args.upload)}")
    return status


def path_of(folder: Path, cfg: Config, suffix: str) -> Path:
    """Where a format's file (or folder) is written."""
    return folder / f"{Path(cfg.resume).name.split('.')[0]}{suffix}"


def report_of(path: Path, cfg: Config) -> dict[str, Any]:
    """A report of `firing_num.py`; UserError unless it is one of the checkpoint that is exported."""
    from utils.measure.measurement import checkpoint_facts

    try:
        report = json.loads(path.read_text())
        measured = report["checkpoint"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--report {path} is no report.json of firing_num.py ({first_line(error)})") from error
    if measured != checkpoint_facts(cfg.resume, {})["sha256"]:
        raise UserError(f"--report {path} is of another checkpoint; measure {cfg.resume} with firing_num.py")
    found: dict[str, Any] = report
    return found


def export(cfg: Config, kinds: list[str], folder: Path, *, samples: int, fold: bool, report: Any = None) -> int:
    """Write and compare each format; 1 if one computes something else than the checkpoint."""
    import torch

    import model as models  # noqa: F401 -- registers the models
    from utils.data.datasets import resolve_data
    from utils.data.loaders import build_eval_loader
    from utils.run.build import build_model
    from utils.run.checkpoint import load_weights
    from utils.run.export_formats import FORMATS, Logits, Source
    from utils.run.plugins import import_plugins

    import_plugins(cfg.plugin)

    def loaded() -> nn.Module:
        net = build_model(cfg)
        load_weights(net, cfg.resume, use_ema=cfg.use_ema)
        return net.eval()

    plain, data = loaded(), resolve_data(cfg)
    batches = iter(build_eval_loader(replace(cfg, workers=0), device=torch.device("cpu")))  # few samples
    x = next(batches)[0]
    while len(x) < samples and (more := next(batches, None)):
        x = torch.cat([x, more[0]])
    x = x[:samples]
    folder.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with torch.no_grad():
        expected = Logits(plain)(x)
        for kind in kinds:
            form, net = FORMATS[kind], loaded()
            if fold and form.takes_folded:
                if not hasattr(net, "fuse"):
                    raise UserError(f"model {cfg.model} has no fuse(), which folds BatchNorm; add --keep-batchnorm")
                net.fuse()  # type: ignore[operator]
            path = path_of(folder, cfg, form.suffix)
            said = form.write(Source(net, x[:2].clone(), cfg, data, report), path)
            agreement = compare(plain, expected, form.load(path, loaded()), x)
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
            print(f"{kind}: {path} ({size / 2**20:.1f} MiB), {said}")
            print(f"  {agreement}")
            wrong += not agreement.agrees
    if wrong:
        print("not every difference is explained by rounding: do not use these files, and report this")
    return 1 if wrong else 0


def compare(plain: nn.Module, expected: Tensor, exported: Run, x: Tensor) -> Agreement:
    """How far `exported` agrees with `expected`, the logits `[B, K]` of `plain` for `x`."""
    found = exported(x)
    flipped = (found.argmax(1) != expected.argmax(1)).nonzero().flatten().tolist()
    near = [i for i in flipped if near_threshold(plain, x[i : i + 1])]
    return Agreement(
        samples=len(x),
        difference=(found - expected).abs().max().item(),
        largest=expected.abs().max().item(),
        flipped=flipped,
        near=near,
    )


def near_threshold(plain: nn.Module, x: Tensor) -> int:
    """How many membrane potentials lie within rounding of their threshold while `plain` computes `x`."""
    from utils.run.potentials import recorded

    count = 0
    with recorded(plain) as potentials:
        plain(x)
    for threshold, steps in potentials:
        for v in steps:
            count += int(((v - threshold).abs() <= ROUNDING * max(1.0, v.abs().max().item())).sum())
    return count


if __name__ == "__main__":
    run_script(main)
