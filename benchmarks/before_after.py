"""Two checkouts of this repository against each other: is the later one as fast?

    git worktree add --detach ../before COMMIT
    python -m benchmarks.before_after --before ../before --after .

For each row both build the same model in their own way, each in a child process, and steps take turns. The rows are
those of benchmarks/train_step.py, inference.py and sparse_engine.py for this project's model. Printed is the time
before divided by the time after, the median of the rounds; at least 0.97 is the aim.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

AIM = 0.97
ROWS = (
    *(f"{size} train {precision}" for size in ("cifar", "digits") for precision in ("fp32", "bf16")),
    *(f"{size} evaluate {way}" for size in ("cifar", "digits") for way in ("fp32", "fp32 fuse", "bf16 fuse")),
    *(f"cifar evaluate fp32 {way}" for way in ("sparse", "sparse bits")),
    *(f"cifar train fp32 sparse{way}" for way in ("", " checkpoint", " bf16-grad", " bf16-grad checkpoint")),
    "cifar train bf16 sparse",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--before", type=Path, required="--serve" not in sys.argv, help="folder of the earlier checkout"
    )
    parser.add_argument("--after", type=Path, default=".", help="folder of the later one (default: this folder)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--batch", type=int, default=0, help="images per step (0: by size and device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.batch, torch.device(args.device))
    for option, folder in (("--before", args.before), ("--after", args.after)):
        if not (folder / "model.py").is_file():
            parser.error(f"{option} {folder}: no checkout of this repository, it has no model.py")
    return compare(args)


def compare(args: argparse.Namespace) -> None:
    # Not at the top: the children have the benchmarks folder of their checkout.
    from benchmarks.children import SteppingChild
    from benchmarks.measure import Spread, interleave, print_json, print_table, speedup

    folders = {"before": args.before.resolve(), "after": args.after.resolve()}
    device, rows, results, failed = torch.device(args.device), [], dict[str, Any](), dict[str, str]()
    for name in args.rows:
        # -P: modules are not imported from the folder of this file.
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", name]
        command += ["--batch", str(args.batch), "--device", args.device]
        with contextlib.ExitStack() as children:
            calls = {
                side: children.enter_context(SteppingChild(command, {"PYTHONPATH": str(folder)}, folder))
                for side, folder in folders.items()
            }
            seconds = interleave(calls, rounds=args.rounds, device=device)
        failed |= {f"{name}, {side}": reason for side, reason in seconds.failed.items()}
        ratio = speedup(seconds, "before", "after")
        ms = {side: 1e3 * Spread.of(seconds.get(side, [math.nan])).median for side in folders}
        results[name] = {"ms": ms, "ratio": ratio.median, "quartiles": [ratio.low, ratio.high]}
        cells = [*(f"{value:.1f}" for value in ms.values()), str(ratio), "yes" if ratio.median >= AIM else "no"]
        rows.append([name, *cells])
        print(" ".join(rows[-1]), file=sys.stderr)
    print_table(["row", "before, ms", "after, ms", "before / after", f"at least {AIM}"], rows, failed)
    git = ("git", "rev-parse", "HEAD")
    commits = [subprocess.run(git, cwd=f, capture_output=True, text=True).stdout.strip() for f in folders.values()]
    print_json("benchmarks.before_after", {"commits": commits, "rows": results}, device, failed)


def serve(row: str, batch: int, device: torch.device) -> None:
    """In the child: one step per line read, answered as `benchmarks.children.SteppingChild` expects."""
    try:
        step = step_of(row, batch, device)
        for _ in sys.stdin:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            print("done", flush=True)
    except Exception as error:
        print(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise


def step_of(row: str, batch: int, device: torch.device) -> Callable[[], object]:
    """One step with the model of the checkout whose modules this process imports, as fast as it can."""
    from benchmarks import sizes
    from model import sdt

    size, work, precision, *options = row.split()
    training, sparse, amp_dtype = work == "train", "sparse" in options, {"bf16": torch.bfloat16}.get(precision)
    x, y = sizes.batch(size, batch or sizes.batch_size(size, device), device)
    found("utils.run.allocator:keep_freed_memory", "utils.allocator:keep_freed_memory")(device.type == "cpu")
    # `event` is the first name of the engine `sparse`, and still accepted.
    engine = {"engine": "event", "bf16_input_grad": "bf16-grad" in options} if sparse else {}
    accelerate = found("module.accelerate:accelerate")
    torch.manual_seed(0)
    model = sdt(**sizes.arguments(size), **({} if accelerate else engine)).to(device)
    if sparse:  # as in benchmarks/sparse_engine.py: channels innermost, and BatchNorm statistics of one batch
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
            norm.momentum = None
        with torch.no_grad():
            model.train()(x)
    model.train(training).set_grad_checkpointing("checkpoint" in options)
    if accelerate:
        accelerate(model, amp_dtype=amp_dtype, training=training, **engine)
    call: Callable[..., Any] = model.fuse() if "fuse" in options else model
    if "bits" in options:
        call = (found("module.accelerate:for_evaluation") or type(model).for_evaluation)(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        amp = torch.autocast(device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None)
        with torch.set_grad_enabled(training), amp:
            logits = call(x)[0]
        if training:
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def found(*places: str) -> Any:
    """The first `module:name` that this checkout has, or None."""
    for module, name in (place.split(":") for place in places):
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(module), name)
    return None


if __name__ == "__main__":
    main()
