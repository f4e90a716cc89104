"""What a launcher tells a process about its place among the others, and how the processes meet."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from utils.errors import UserError, listed, shortened

_PATIENCE = 10.0  # seconds after which a process says for whom it waits, and how often it says so again
_JOIN_TIMEOUT = 600.0  # seconds


class Place(NamedTuple):
    """Where a launcher put this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(local_rank: int = 0) -> Place:
    """Read the variables of torchrun and torch.distributed.launch, or of a SLURM step; else there is one process.

    Args:
        local_rank: what an old launcher passed as an option, where the environment has no LOCAL_RANK.

    Raises:
        UserError: a variable that is not a number, or a rank that does not exist.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world_size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
        local, local_world_size = _number("LOCAL_RANK", local_rank), _number("LOCAL_WORLD_SIZE", world_size)
        for name, value, total in (("RANK", rank, world_size), ("LOCAL_RANK", local, local_world_size)):
            if name in os.environ and value >= total:
                raise UserError(
                    f"environment variable {name}={value} is not below {total}, the number of processes; start them "
                    "with torchrun, or unset RANK and WORLD_SIZE"
                )
        return Place(rank, world_size, local, local_world_size)
    # Only srun sets the STEP variables. A plain python in a batch script sees SLURM_NTASKS too, and is one process.
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
        os.environ.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 20000))
        world_size = _number("SLURM_STEP_NUM_TASKS", 1)
        os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=str(world_size))
        local_world_size = min(world_size, _number("SLURM_STEP_TASKS_PER_NODE", world_size))
        return Place(_number("SLURM_PROCID", 0), world_size, _number("SLURM_LOCALID", 0), local_world_size)
    for name in ("RANK", "WORLD_SIZE"):
        if os.environ.get(name, "0") not in ("0", "1" if name == "WORLD_SIZE" else "0"):
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise UserError(
                f"environment variable {name}={os.environ[name]!r} is set without {other}; start the processes with "
                f"torchrun, or unset {name}"
            )
    return Place(0, 1, local_rank, 1)


def _first_host(nodes: str) -> str:
    """The first host of SLURM's list: `gpu[03-05,09],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return (match[1] + (match[2] or "")) if match else nodes


def _number(name: str, default: int, high: int = 10**9) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    # SLURM writes "2(x3),1" for two tasks on each of three nodes and one on the last.
    match = re.match(r"\d{1,10}(?=\D)", value) if name.startswith("SLURM_") else None
    digits = match[0] if match else value
    if not re.fullmatch(r"[0-9]{1,10}", digits) or int(digits) > high:
        what = "is not a whole number" + (f" from 0 to {high}" if digits.lstrip("-").isdigit() else "")
        raise UserError(f"environment variable {name}={shortened(value)} {what}; start the processes with a launcher")
    return int(digits)


def join(place: Place) -> dist.Store:
    """The store by which the processes of a run find each other, once all of them are there.

    Whoever waits for another one says so after some seconds.

    Raises:
        UserError: the address is missing or wrong, or a process did not come in ten minutes; the message says which.
    """
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun holds the store, has brought all of its processes together, and ends them if one is missing.
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_TIMEOUT)))
            return store
        started = time.monotonic()
        store = _connect(place, started)
        _wait_for_all(store, place, started)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise _cannot_join(place, str(error).splitlines()[0]) from error
    return store


def _connect(place: Place, started: float) -> dist.Store:
    """The store that the first process holds, as soon as it answers."""
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 0, 65535)
    if not host or not port:
        raise _cannot_join(place, f"{'MASTER_PORT' if host else 'MASTER_ADDR'} is not set")
    told = started
    while place.rank > 0 and (reason := _why_no_answer(host, port)):
        now = time.monotonic()
        missing = f"rank 0 does not answer at MASTER_ADDR {host}, MASTER_PORT {port} ({reason})"
        if now - started >= _JOIN_TIMEOUT:
            raise _cannot_join(place, f"after {now - started:.0f} s {missing}")
        if now - told >= _PATIENCE:
            told = now
            _say(place, f"{missing}; is it started, and is the address right? Waiting")
        time.sleep(min(1.0, _PATIENCE))
    timeout = timedelta(seconds=_JOIN_TIMEOUT)
    return dist.TCPStore(
        host, port, place.world_size, place.rank == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )


def _why_no_answer(host: str, port: int) -> str:
    """Why nobody listens there, or ''. Asked by hand: torch's own attempts end in pages of C++ frames."""
    try:
        socket.create_connection((host, port), timeout=min(5.0, _PATIENCE)).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _wait_for_all(store: dist.Store, place: Place, started: float) -> None:
    """Return when all processes have the store."""
    keys = {rank: f"here/{rank}" for rank in range(place.world_size)}
    store.set(keys[place.rank], "")
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        waited = time.monotonic() - started
        names = f"{len(missing)} of {place.world_size} are missing: rank {listed([str(rank) for rank in missing], 20)}"
        if waited >= _JOIN_TIMEOUT:
            raise _cannot_join(place, f"after {waited:.0f} s {names}")
        try:
            store.wait([keys[rank] for rank in missing], timedelta(seconds=min(_PATIENCE, _JOIN_TIMEOUT)))
        except RuntimeError:
            if place.rank == 0:
                _say(place, f"{names}; are they started, with this MASTER_ADDR and MASTER_PORT? Waiting")


def _say(place: Place, text: str) -> None:
    print(f"rank {place.rank} of {place.world_size} processes: {text}", file=sys.stderr, flush=True)


def _cannot_join(place: Place, reason: str) -> UserError:
    error = UserError(
        f"rank {place.rank} cannot join the {place.world_size} processes of RANK, WORLD_SIZE, MASTER_ADDR and "
        f"MASTER_PORT in the environment: {reason}; start them with torchrun, or unset RANK and WORLD_SIZE"
    )
    error.in_every_process = False
    return error
