"""A training step as one CUDA graph: where it is left off and why, and that replays compute what the steps would.

Without a device the graph is played by `Played`: it notes the operators of the step while they run, as a capture does,
undoes them, since a capture computes nothing, and repeats the operators on the same memory. What Python decided during
the capture stays as it was then, which is what can go wrong with graphs.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import Linear, lively, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from module.accelerate import accelerate
from utils.config.parse import config_from
from utils.errors import UserError
from utils.run.precision import Precision
from utils.train.cuda_graph import WARM_UP, StepGraph, why_not
from utils.train.lamb import DeviceLamb
from utils.train.step import TrainStep

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Played(TorchDispatchMode):
    """A CUDA graph on a CPU."""

    made = 0

    def __init__(self):
        super().__init__()
        self.calls = []
        Played.made += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(out)))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                for old, new in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@pytest.fixture
def played(monkeypatch):
    """torch.cuda's graphs and streams, played; the state that a capture must leave alone is given to the fixture."""
    kept = []

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before = [[value.clone() for value in tensors(state())] for state in kept]
        with graph:
            yield
        for state, values in zip(kept, before, strict=True):
            for now, value in zip(tensors(state()), values, strict=True):
                now.data.copy_(value)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Played,
        "graph": capture,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    Played.made = 0
    return kept


def state_of(step):
    optimizer = step.optimizer
    return lambda: [step.model.state_dict(), [optimizer.state[p] for p in optimizer.state], optimizer.param_groups]


def run(model, optimizer, batches, *, graphed, rates=None, kept=None, **options):
    """Losses of the steps; `rates`: step -> learning rate from there on."""
    step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, PLAIN, graphed=graphed, **options)
    if kept is not None:
        kept[:] = [state_of(step)]
    losses = []
    for i, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = (rates or {}).get(i, group["lr"])
        losses.append(float(step.run(x, y, i, len(batches) - 1)))
    return losses


RATE = 2**-6  # float32, in which a graph has it, holds it exactly
PLAIN = Precision(config_from({}), CPU)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, fused=True),
    "lamb": lambda p: DeviceLamb(p, lr=RATE),
}


def batches_of(number, size=4):
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 6, generator=random), torch.randint(7, (size,), generator=random)) for _ in range(number)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_give_the_losses_and_weights_of_the_steps(name, played):
    plain, graphed = Linear(), Linear()
    graphed.load_state_dict(plain.state_dict())
    expected = run(plain, OPTIMIZERS[name](plain.parameters()), batches_of(7), graphed=False)
    found = run(graphed, OPTIMIZERS[name](graphed.parameters()), batches_of(7), graphed=True, kept=played)
    assert Played.made == 1
    assert found == expected
    torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_replays_of_the_spiking_model_move_its_running_statistics(played):
    plain = lively(tiny())
    graphed = copy.deepcopy(plain)
    random = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 3, 16, 16, generator=random), torch.tensor([0, 1]))] * (WARM_UP + 2)
    results = []
    for model in (plain, graphed):
        accelerate(model, prove=False)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2**-10, fused=True)
        results.append(run(model, optimizer, batches, graphed=model is graphed, kept=played))
    assert results[0] == results[1]
    torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_learning_rate_reaches_the_graph_and_another_shape_runs_without(name, played):
    plain, graphed = Linear(), Linear()
    graphed.load_state_dict(plain.state_dict())
    batches = [*batches_of(6), *batches_of(1, size=3), *batches_of(3)]
    rates = {5: 2**-8, 8: 2**-7}
    expected = run(plain, OPTIMIZERS[name](plain.parameters()), batches, graphed=False, rates=rates)
    optimizer = OPTIMIZERS[name](graphed.parameters())
    assert run(graphed, optimizer, batches, graphed=True, rates=rates, kept=played) == expected
    assert Played.made == 1
    assert {(group["lr"], group.get("capturable", False)) for group in optimizer.param_groups} == {(2**-7, False)}


def test_a_learning_rate_of_each_update_reaches_the_graph(played):
    results = []
    for graphed in (False, True):
        model = Linear()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        optimizer = OPTIMIZERS["adamw"](model.parameters())

        def set_rate(step, optimizer=optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 2.0 ** -(6 + step)

        results.append(run(model, optimizer, batches_of(7), graphed=graphed, kept=played, set_rate=set_rate))
    assert results[0] == results[1]
    assert Played.made == 1


def test_batches_are_mixed_and_averaged_around_the_graph(played):
    calls = []

    def mixup(x, y):
        calls.append("mix")
        return x, torch.nn.functional.one_hot(y, 7).float()

    model = Linear()
    options = dict(mixup=mixup, after_update=lambda: calls.append("updated"), kept=played)
    run(model, OPTIMIZERS["sgd"](model.parameters()), batches_of(6), graphed=True, **options)
    assert Played.made == 1
    assert calls == ["mix", "updated"] * 6


def test_a_step_that_cannot_be_captured_says_why(played):
    def compute(x, y):
        if played:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x, y

    graph = StepGraph(compute, torch.optim.SGD(Linear().parameters()))
    x, y = batches_of(1)[0]
    for _ in range(WARM_UP):
        graph(x, y)
    played.append(lambda: [])
    with pytest.raises(
        UserError, match=r"cuda_graph: the training step cannot be captured: operation not .* capturing;"
    ):
        graph(x, y)


FUSED = OPTIMIZERS["adamw"]


class OwnStream(nn.Module):
    acceleration = (SimpleNamespace(runs_as="SpikingJelly's CuPy kernel"),)


class WithoutMomentum(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None)


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        (None, {}),
        (None, dict(settings={"mixup": 0.5, "amp": True, "clip_grad": 1.0, "model_ema": True})),
        (None, dict(optimizer=OPTIMIZERS["sgd"])),
        (None, dict(settings={"sched_on_updates": True})),
        (None, dict(optimizer=OPTIMIZERS["lamb"])),
        ("the run is on cpu", dict(device=CPU)),
        ("2 processes exchange gradients", dict(world_size=2)),
        ("grad_accum_steps 2", dict(settings={"grad_accum_steps": 2})),
        ("compile:", dict(settings={"compile": True})),
        ("grad_checkpointing reads", dict(settings={"grad_checkpointing": True})),
        ("the optimizer AdamW computes on the host", dict(optimizer=lambda p: torch.optim.AdamW(p, foreach=True))),
        ("the optimizer Adagrad computes on the host", dict(optimizer=torch.optim.Adagrad)),
        ("CuPy kernels run on a stream of their own", dict(model=OwnStream())),
        ("norm: without a momentum", dict(model=WithoutMomentum())),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(value) or "plain",
)
def test_the_reason_why_there_is_no_graph(reason, given):
    parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = given.get("optimizer", FUSED)(parameters)
    cfg = config_from(given.get("settings", {}))
    world_size = given.get("world_size", 1)
    found = why_not(cfg, given.get("device", CUDA), world_size, [given.get("model", Linear())], optimizer)
    assert (found is None) == (reason is None)
    assert found is None or found.startswith(reason) or reason in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
def test_graph_equals_steps_on_cuda(name, dtype):
    random = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 16, 16, generator=random).cuda() for _ in range(8)]
    first, results = lively(tiny()).cuda(), []
    for graphed in (False, True):
        model = copy.deepcopy(first)
        settings = {"amp": True, "amp_dtype": dtype} if dtype else {}
        precision = Precision(config_from(settings), CUDA)
        accelerate(model, amp_dtype=precision.dtype if dtype else None)
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, precision, graphed=graphed)
        losses = [float(step.run(x, torch.arange(4).cuda(), i, 7)) for i, x in enumerate(images)]
        step.finish()
        results.append((losses, model.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
