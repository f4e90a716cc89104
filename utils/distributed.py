"""Processes and devices: one code path for plain python, torchrun and torch.distributed.launch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.settings import Config


@dataclass(frozen=True)
class Process:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def sum(self, *counts: float) -> list[float]:
        """Each number summed over all processes. Counts stay exact up to 2**53 (float64)."""
        if self.world_size == 1:
            return list(counts)
        return self.sum_tensor(torch.tensor(counts, dtype=torch.float64)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, on the CPU."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()


@contextlib.contextmanager
def distributed(cfg: Config) -> Iterator[Process]:
    """Join the process group that a launcher's environment describes, and always leave it again.

    Launchers set RANK, WORLD_SIZE and LOCAL_RANK; without them the run is one process.

    Raises:
        UserError: no such device, or two processes on one GPU.
    """
    world_size = _from_environment("WORLD_SIZE", 1)
    rank = _from_environment("RANK", 0)
    local_rank = _from_environment("LOCAL_RANK", cfg.local_rank)
    device = _choose_device(cfg.device, local_rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Process(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name}={value!r} is not a whole number") from None


def _choose_device(name: str, local_rank: int, world_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not gpus:
        raise UserError(f"device: {name!r} needs a CUDA device and torch sees none; use --device cpu")
    if name != "cuda":
        if world_size > 1:
            raise UserError(
                f"device: {name!r} would put {world_size} processes on one GPU; use --device cuda, "
                "which gives each process its own"
            )
        index = int(name.removeprefix("cuda:"))
    else:
        index = local_rank
    if index >= gpus:
        raise UserError(
            f"this process needs GPU {index}, but torch sees only {gpus} ({gpus} processes per node at most: two on "
            "one GPU are refused); start fewer processes, or use --device cpu"
        )
    return torch.device("cuda", index)
