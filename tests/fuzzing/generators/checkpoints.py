"""Checkpoints: bits flipped, files cut, fields and tensors of another kind, and what a run goes on from."""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.fuzzing.cases import Case, generator
from tests.fuzzing.values import anything, shortened
from utils import torch_file
from utils.config.parse import config_from
from utils.run.checkpoint import load_weights
from utils.run.precision import Precision
from utils.train.optim import make_optimizer, make_schedule
from utils.train.run_state import RunState

_NAME = "last.pth.tar"
_FIELDS = ("epoch", "progress", "history", "best", "config", "optimizer", "amp_scaler", "plugins", "parts", "plateau")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def _run() -> tuple[RunState, Any]:
    cfg, net = config_from({"opt": "adamw", "epochs": 3, "sched": "step", "warmup_epochs": 0}), _net()
    optimizer = make_optimizer(cfg, net)
    schedule, _ = make_schedule(cfg, optimizer, 5)
    return RunState(net, optimizer, schedule, Precision(cfg, torch.device("cpu")), None), cfg


@functools.cache
def _written() -> bytes:
    state, cfg = _run()
    for _ in range(2):
        state.model(torch.ones(2, 2, 2, 2)).sum().backward()
        state.optimizer.step()
    progress = {"steps": 2, "loss_sums": [1.5], "samples": [4.0]}
    content = state.snapshot(cfg) | {"epoch": 1, "history": [(50.0, 0)], "best": (50.0, 0), "progress": progress}
    file = io.BytesIO()
    torch_file.save(content, file)
    return file.getvalue()


def _content() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(_written()), weights_only=True)
    return found


def _resume(path: Path) -> RunState:
    state, cfg = _run()
    state.restore(path, cfg)
    state.model(torch.ones(2, 2, 2, 2)).sum().backward()
    state.optimizer.step()  # where it turns out whether each parameter has its moments
    return state


def _measure(path: Path) -> nn.Module:
    net = _net()
    load_weights(net, path)
    return net


def _same_or_refused(path: Path) -> None:
    """Load a damaged file; what loads must be what was written."""
    net = _measure(path)
    for key, value in _content()["state_dict"].items():
        assert torch.equal(net.state_dict()[key], value), f"{key} changed without a word"


@generator("checkpoint bytes", share=1.5)
def changed_bytes(rng: random.Random, folder: Path) -> Case:
    """A whole checkpoint with bits flipped, cut off, or replaced by something else; by torch alone too."""
    content = bytearray(_written())
    if rng.random() < 0.4:
        file = io.BytesIO()
        torch.save(_content(), file)
        content = bytearray(file.getvalue())
    kind = rng.choice(("bit", "bit", "bits", "cut", "noise"))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else 20):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    else:
        content = bytearray(rng.randbytes(rng.choice((0, 1, 30, 5000))))
    (folder / _NAME).write_bytes(content)
    return Case(f"a checkpoint, {kind}", functools.partial(_same_or_refused, Path(_NAME)), (_NAME,))


@generator("checkpoint fields", share=1.5)
def one_field(rng: random.Random, folder: Path) -> Case:
    """A field of a checkpoint that a run goes on from is replaced or removed."""
    content = _content()
    field = rng.choice((*_FIELDS, *content))
    holder: Any = content
    where = field
    if isinstance(content.get(field), dict) and content[field] and field != "state_dict" and rng.random() < 0.5:
        holder, field = content[field], rng.choice(list(content[field]))
        where = f"{where}.{field}"
    value = anything(rng)
    if rng.random() < 0.2:
        holder.pop(field, None)
        what = "removed"
    else:
        holder[field], what = value, shortened(value)
    with (folder / _NAME).open("wb+") as file:
        torch_file.save(content, file)
    return Case(f"resume, {where}: {what}", functools.partial(_resume, Path(_NAME)), (_NAME,))


@generator("checkpoint tensors", share=1.5)
def one_tensor(rng: random.Random, folder: Path) -> Case:
    """A weight or a moment of another shape, kind or value, missing, or there twice."""
    content = _content()
    moments = rng.random() < 0.5
    if moments:
        number = rng.choice(list(content["optimizer"]["state"]))
        tensors = content["optimizer"]["state"][number]
    else:
        tensors = content["state_dict"]
    key = rng.choice([key for key, value in tensors.items() if value.is_floating_point()])
    value = tensors[key]
    kind = rng.choice(("nan", "infinite", "kind", "shape", "missing", "sparse", "meta", "complex", "twice"))
    if kind in ("nan", "infinite"):
        tensors[key] = value.clone()
        tensors[key].view(-1)[rng.randrange(value.numel())] = float("nan" if kind == "nan" else "inf")
    elif kind == "kind":
        tensors[key] = value.to(rng.choice((torch.int8, torch.bool, torch.int64)))
    elif kind == "shape":
        tensors[key] = torch.zeros(*value.shape, 2)
    elif kind == "missing":
        del tensors[key]
    elif kind == "sparse":
        tensors[key] = value.reshape(-1).to_sparse()
    elif kind == "meta":
        tensors[key] = value.to("meta")
    elif kind == "complex":
        tensors[key] = value.to(torch.complex64)
    else:
        content["state_dict"]["module.0.weight"] = torch.zeros(3, 2, 1, 1)
        key = "module.0.weight"
    with (folder / _NAME).open("wb+") as file:
        torch_file.save(content, file)
    call = _resume if moments or rng.random() < 0.5 else _measure
    return Case(f"{'moment' if moments else 'weight'} {key}: {kind}", lambda: call(Path(_NAME)), (_NAME,), False)
