"""Ours against SpikingJelly 2.x's own spike-driven transformer, same sizes and batch, training or evaluation.

    python -m benchmarks.spikingjelly2 --size cifar
    python -m benchmarks.spikingjelly2 --size digits --evaluation

SpikingJelly 2.x and what it needs beyond this project's packages are installed by pip into a folder of their own
(--folder) and seen by a child process only: they are no dependencies of this project. The child builds its model once
and does one step per line it reads, so its steps and ours are interleaved like any other two candidates.

Without a package index, prepare the folder elsewhere (--prepare) and bring it along: a folder that holds that version
is used as it is. Or name the interpreter of an environment that has it (--python).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import sizes

VERSION = "2.0.0"
# Without their own dependencies: torch and the rest come from this project's environment.
PACKAGES = (f"spikingjelly=={VERSION}", "loguru<1", "h5py", "scipy", "packaging", "requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes.NAMES, default="cifar")
    parser.add_argument("--batch", type=int, default=0, help="images per step (0: by size and device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--evaluation", action="store_true", help="forward passes instead of training steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="output/benchmarks/spikingjelly2", help="of the installed packages")
    parser.add_argument("--prepare", action="store_true", help="install into --folder, and stop")
    parser.add_argument("--python", default="", help="interpreter that has SpikingJelly 2.x; --folder is then not used")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = args.batch or sizes.batch_size(args.size, device)
    if args.prepare:
        install(Path(args.folder))
    elif args.serve:
        try:
            serve(args, batch, device)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
            raise
    else:
        compare(args, batch, device)


def compare(args: argparse.Namespace, batch: int, device: torch.device) -> None:
    # Not at the top: the child has another SpikingJelly, which these do not know.
    from benchmarks.candidates import Candidate
    from benchmarks.children import SteppingChild
    from benchmarks.measure import Call, Spread, interleave, on_first_call, print_json, print_table, speedup

    ours = Candidate(f"ours:{args.precision}" + (":fuse" if args.evaluation else ""))
    build = ours.evaluation if args.evaluation else ours.training_step
    command = [args.python or sys.executable, "-m", "benchmarks.spikingjelly2", *sys.argv[1:], "--serve"]
    path = os.pathsep.join([str(Path(args.folder).resolve()), os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as children:

        def theirs() -> Call:
            if args.python:
                return children.enter_context(SteppingChild(command, {}))
            install(Path(args.folder))
            return children.enter_context(SteppingChild(command, {"PYTHONPATH": path}))

        name = f"spikingjelly {VERSION}"
        calls = {
            name: on_first_call(theirs),
            ours.name: on_first_call(lambda: build(args.size, batch, device)),
        }
        seconds = interleave(calls, rounds=args.rounds, device=device)
    rows, results = [], {}
    for candidate in seconds:
        step, gain = Spread.of(seconds[candidate]), speedup(seconds, name, candidate)
        rows.append([candidate, f"{step.median * 1e3:.1f}", f"{batch / step.median:.1f}", f"{gain.median:.2f}x"])
        results[candidate] = {"ms": step.median * 1e3, "speedup": gain.median}
    print_table(["candidate", "ms/step", "images/s", "speed-up"], rows, seconds.failed)
    facts = {"size": args.size, "batch": batch, "evaluation": args.evaluation, "candidates": results}
    print_json("benchmarks.spikingjelly2", facts, device, seconds.failed)


def install(folder: Path, packages: Sequence[str] = PACKAGES, python: str = sys.executable) -> None:
    """Install the packages into `folder` unless it holds the first one in that version, whoever put it there."""
    name, _, version = packages[0].partition("==")
    if (folder / f"{name}-{version}.dist-info").is_dir():
        return
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, *packages], check=True)


def serve(args: argparse.Namespace, batch: int, device: torch.device) -> None:
    """In the child: one step per line read, answered as `benchmarks.children.SteppingChild` expects."""
    if (found := importlib.metadata.version("spikingjelly")) != VERSION:
        raise ValueError(f"this is SpikingJelly {found}, not {VERSION}; give another --folder or --python")
    # SpikingJelly 2.x, by the order of PYTHONPATH or in the interpreter that was given.
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.model import spike_driven_transformer as theirs

    if device.type == "cuda":
        # Ours against its kernels (Triton, or its own for CUDA), not against its torch code.
        chosen = functional.neuron_implementation("lif", device)
        if "torch" in str(chosen["implementation"]):
            raise ValueError(f"its neurons would run on torch: {chosen}")
    sizes_of = sizes.arguments(args.size)
    torch.manual_seed(0)
    names = ("in_channels", "num_classes", "embed_dims", "depths", "pooling_stat")
    # Its defaults choose its kernels; detach_reset as published, and as ours.
    own = {name: sizes_of[name] for name in names if name in sizes_of}
    model = theirs.SpikeDrivenTransformer(T=4, num_heads=8, detach_reset=True, **own).to(device)
    model.train(not args.evaluation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = sizes.batch(args.size, batch, device)
    lower = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]

    def logits() -> torch.Tensor:
        with torch.autocast(device.type, dtype=lower or torch.bfloat16, enabled=lower is not None):
            out: torch.Tensor = model(x)
        functional.reset_net(model)
        return out.float().mean(0) if out.dim() == 3 else out.float()

    for _ in sys.stdin:
        with torch.set_grad_enabled(not args.evaluation):
            out = logits()
            if not args.evaluation:
                F.cross_entropy(out, y).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    main()
