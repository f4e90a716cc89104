"""Processes and devices: one code path for plain python, torchrun, torch.distributed.launch and SLURM."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.config.settings import Config
from utils.errors import USAGE_ERROR, Stopped, UserError
from utils.run.allocator import keep_freed_memory
from utils.run.faults import ended_worker, lost_partner
from utils.run.launcher import Place, find_place, join

# How long processes wait for one that converts or downloads data; NCCL would give up after 10 minutes.
_WAIT_TIMEOUT = timedelta(days=1)
_FAREWELL = 3.0  # seconds that the first process waits for the others when it fails


@dataclass(frozen=True)
class Process:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device
    # A CPU group for small decisions, so that they never wait for the GPU.
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints messages."""
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

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; the answer is the same in all of them."""
        return max(self.gather(flag)) > 0

    def wait_for_all(self) -> None:
        """Return when every process has called this."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Copy rank 0's running statistics of `module` to every process; they may be on any device."""
        if self.world_size == 1:
            return
        for buffer in module.buffers():
            value = buffer.detach().cpu()
            dist.broadcast(value, src=0, group=self.control)
            buffer.copy_(value)

    def first_reasons(self, mine: dict[str, str | None]) -> dict[str, str | None]:
        """For each key the reason that the first process with one gives; None where none has any."""
        if self.world_size == 1:
            return mine
        all_of_them = self.gather_objects(mine)
        return {key: next((found[key] for found in all_of_them if found.get(key)), None) for key in mine}

    def gather_objects(self, value: Any) -> list[Any]:
        """The object of each process, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def gather(self, value: float) -> list[float]:
        """The value of each process, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64)
        values = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(values, mine, group=self.control)
        return [float(v) for v in values]


def patient_group() -> dist.ProcessGroup:
    """All processes, on their CPUs, for decisions and for waiting long."""
    group = dist.new_group(backend="gloo", timeout=_WAIT_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def keep_gradient_strides(model: torch.nn.Module) -> None:
    """Give the gradient of each 1 x 1 weight the strides of the weight, without a copy.

    Channels-last and contiguous are the same memory there, and torch's kernels choose either; data-parallel training
    would copy each gradient, and warn, where the strides differ.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.dim() == 4 and weight.shape[2:] == (1, 1):
            shape, strides = weight.shape, weight.stride()
            weight.register_hook(
                lambda g, shape=shape, strides=strides: g.as_strided(shape, strides) if g.is_contiguous() else g
            )


@contextlib.contextmanager
def distributed(cfg: Config) -> Iterator[Process]:
    """Join the process group that the environment of a launcher describes, and leave it at the end.

    When a process fails, the launcher ends the others. The first one to fail shows its error; the others, which fail
    because of it, show none. Where a process was killed, its partners say so.

    Raises:
        UserError: no such device, two processes on one GPU, a process that does not come, or one that was killed.
    """
    place = find_place(cfg.local_rank)
    device = choose_device(cfg.device, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if place.world_size == 1:
        try:
            yield Process(0, 1, device)
        except (RuntimeError, OSError, EOFError) as error:
            if message := ended_worker(error):
                raise message from error
            raise
        return
    rank, world_size = place.rank, place.world_size
    # torchrun's store outlives a restart: a process started again must not read the addresses of those before it.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", join(place))
    backend = "nccl" if device.type == "cuda" else "gloo"
    failed = False
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        control = patient_group()
        yield Process(rank, world_size, device, control)
        # The process that holds the store must not end while the others still use it.
        dist.barrier(group=control)
    except Stopped:
        # All processes stop together.
        raise
    except Exception as error:
        failed = True
        lost = lost_partner(error)
        shown = ended_worker(error) or lost or error
        # Without the store, the process that held it has ended. It may have been killed, so one that lost it says so.
        first = _failures(store, 1)
        if first != 1 and not (first is None and lost):
            sys.exit(USAGE_ERROR if isinstance(shown, UserError) else 1)
        if isinstance(shown, UserError):
            shown.in_every_process = False
        if shown is error:
            raise
        raise shown from error
    finally:
        dist.destroy_process_group()
        if failed and rank == 0:
            _outlast(store, world_size)


def _failures(store: dist.Store, more: int) -> int | None:
    """How many processes have failed, `more` of them now; None where the process that held the store has ended."""
    try:
        with _mute():
            return store.add("failures", more)
    except RuntimeError:
        return None


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Drop what is written to stderr: where a store does not answer, torch's C++ code writes a page of its frames."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _outlast(store: dist.Store, world_size: int) -> None:
    """Hold the store until the others, which now lose their connections, have seen in it that an error was shown."""
    until = time.monotonic() + _FAREWELL
    while (_failures(store, 0) or world_size) < world_size and time.monotonic() < until:
        time.sleep(0.05)


def choose_device(name: str, place: Place) -> torch.device:
    """The device of this process: its own GPU, or the CPU.

    The check is the same in all processes of a node, so that all of them refuse together.

    Raises:
        UserError: no such device, or more processes than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not gpus:
        raise UserError(f"device: {name!r} needs a CUDA device and torch sees none; use --device cpu")
    if name != "cuda":
        index = int(name.removeprefix("cuda:"))
        if place.world_size > 1:
            raise UserError(
                f"device: {name!r} would put {place.world_size} processes on one GPU; use --device cuda, "
                "which gives each process its own"
            )
        if index >= gpus:
            raise UserError(f"device: {name!r} does not exist, torch sees {gpus} GPU(s); the first is cuda:0")
        return torch.device("cuda", index)
    if max(place.local_world_size, place.local_rank + 1) > gpus:
        raise UserError(
            f"{place.local_world_size} processes on this node, but torch sees {gpus} GPU(s), and two processes on one "
            "are refused; start fewer, or use --device cpu. (A launcher that shows each process one GPU of its own, as "
            "SLURM's --gpus-per-task does, must show all of the node's GPUs to each: --gpus-per-node.)"
        )
    return torch.device("cuda", place.local_rank)
