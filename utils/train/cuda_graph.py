"""A whole training step as one CUDA graph: forward pass, loss, backward pass and update are one launch.

The host then does no work per layer, which small models are bound by. A graph repeats the same kernels on the same
memory, so shapes and everything that the host decides must stay what they were when it was captured.

Legend: B batch, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from utils.config.settings import Config
from utils.errors import UserError
from utils.run.build import rows
from utils.train.lamb import DeviceLamb

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Steps before the capture: algorithms are chosen, kernels compiled and the optimizer's state is made in them.
WARM_UP = 3


def why_not(
    cfg: Config, device: torch.device, world_size: int, models: Sequence[nn.Module], optimizer: Optimizer
) -> str | None:
    """None, or the reason why the steps of a run cannot be one graph.

    Args:
        cfg: the settings.
        device: where the run is.
        world_size: number of processes.
        models: as they will run, without wrappers; a teacher is one of them.
        optimizer: of the run.
    """
    if device.type != "cuda":
        return f"the run is on {device.type}, and CUDA graphs are for CUDA devices"
    if world_size > 1:
        return f"{world_size} processes exchange gradients in each step, which a graph would have to repeat together"
    if cfg.grad_accum_steps > 1:
        return f"grad_accum_steps {cfg.grad_accum_steps}: not each batch ends in an update"
    if cfg.compile:
        return "compile: torch.compile decides on the host what runs"
    if cfg.grad_checkpointing:
        return "grad_checkpointing reads the state of the random generator, which cannot be read during a capture"
    if (reason := _host_decides(optimizer)) is not None:
        return reason
    if any("CuPy" in row.runs_as for model in models for row in rows(model)):
        return "SpikingJelly's CuPy kernels run on a stream of their own, which a capture does not see"
    for name, layer in (found for model in models for found in model.named_modules()):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.momentum is None:
            return f"{name}: without a momentum, BatchNorm reads from the device how many batches there were"
    return None


def _host_decides(optimizer: Optimizer) -> str | None:
    """None where an update is the same kernels each time, with all that changes in tensors on the device."""
    kind = type(optimizer)
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if kind is DeviceLamb or (kind in (SGD, Adam, AdamW) and fused):
        return None
    return (
        f"the optimizer {kind.__name__} computes on the host what changes from update to update; use adamw, sgd or lamb"
    )


class StepGraph:
    """Calls `compute`; from the fourth batch on as a graph.

    Batches of another shape than the first run without it. A number that the host passes to a kernel is part of the
    graph: learning rates, which change between steps, are in tensors while it is captured, as float32.

    Args:
        compute: `(x, y) -> (loss, flags)`, a whole training step on device tensors that reads nothing back.
        optimizer: what `compute` updates with.

    Raises:
        UserError: the step cannot be captured, with the reason.
    """

    def __init__(self, compute: Compute, optimizer: Optimizer) -> None:
        self._compute, self._optimizer = compute, optimizer
        self._shapes: Any = None
        self._rates: list[Tensor] = []
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and flags; they stay valid until the next call."""
        shapes = [(t.shape, t.stride(), t.dtype) for t in (x, y)]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            return self._compute(x, y)
        if self._warm < WARM_UP:
            self._warm += 1
            return self._aside(x, y)
        if self._graph is None:
            self._graph = self._captured(x, y)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        return self._outputs

    def _aside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """On another stream than the default one, which cannot be captured: autograd remembers streams."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._compute(x, y)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _captured(self, x: Tensor, y: Tensor) -> torch.cuda.CUDAGraph:
        """Nothing is computed during a capture."""
        self._x, self._y = x.clone(), y.clone()
        self._rates = [torch.zeros((), device=x.device) for _ in self._optimizer.param_groups]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # A failed capture would leave its own stream the current one. Threads of the loader, which pin memory
            # meanwhile, must not end the capture.
            captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
            with torch.cuda.stream(stream), _capturable(self._optimizer, self._rates), captured:
                self._outputs = self._compute(self._x, self._y)
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"cuda_graph: the training step cannot be captured: {lines[0]}; leave cuda_graph out, and resume"
            ) from error
        return graph


@contextlib.contextmanager
def _capturable(optimizer: Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """Learning rates in tensors, and the flag without which some of torch's optimizers refuse a capture; fused ones
    have their step counts on the device anyway. Schedules, logs and checkpoints see what they always do."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group |= {name: old[name] for name in ("lr", "capturable") if name in old}
