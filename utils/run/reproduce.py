"""What is needed to repeat a run: seeds, determinism, versions and the git commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess

import numpy as np
import torch

from utils import ROOT

_PACKAGES = ("torch", "torchvision", "timm", "spikingjelly", "numpy")


def seed_step(seed: int, epoch: int = 0, step: int = 0, rank: int = 0) -> None:
    """Seed python, numpy and torch for one step of one process.

    Random numbers depend on (seed, epoch, step, rank) only. So a resumed run draws the numbers that an uninterrupted
    one would have drawn, and a checkpoint needs no state of a generator.
    """
    state = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.manual_seed(int(state[1]))


def set_deterministic(deterministic: bool) -> None:
    """Choose between the fastest algorithms and those that give the same bits in each run."""
    if deterministic:
        # cuBLAS reads this when it is first used; without it torch refuses its deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """The checked-out commit, with `+changes` when files differ from it; `unknown` outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
