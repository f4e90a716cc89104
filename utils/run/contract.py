"""What a model must have, to be trained and measured here, and the check of it before the first batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from utils.config.settings import Config
from utils.data.datasets import dataset_facts, resolve_data
from utils.errors import UserError


class SpikingModel(Protocol):
    """A `torch.nn.Module` that is called as below.

    Optional, and each used only where a model has it:

    - `spike_sources() -> dict[str, nn.Module]`: name -> the submodule whose output is that spike tensor `[T, B, ...]`;
      without it, the neurons are measured under the names that they have in the model.
    - `set_grad_checkpointing(enable: bool)`: for the setting grad_checkpointing.
    - `fuse() -> nn.Module`: folds BatchNorm for a faster evaluation.
    - `reset_classifier(num_classes: int)`: a new head.
    - `no_weight_decay() -> set[str]`: names of parameters that weight decay leaves out.
    - `depths`, `embed_dims`, `num_heads`, `mlp_ratios`, `pooling_stat`: sizes, for logs and reports.
    """

    T: int  # time steps for which a static image is shown

    def __call__(self, x: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Any]:
        """Images `[B, C, H, W]` or event frames `[B, T, C, H, W]` -> logits, and anything (a hook, or None).

        Logits are `[B, K]`, or `[T, B, K]` with the setting TET. In training mode they may be a tuple of such tensors
        (as of a model with a second head for distillation); the loss is then the mean of their losses.
        """


_METHODS = ("spike_sources", "set_grad_checkpointing", "fuse", "reset_classifier", "no_weight_decay")


def check_contract(cfg: Config, model: nn.Module, device: torch.device) -> None:
    """Find out with one small forward pass whether `model`, which is on `device`, can be trained and measured.

    Weights, running statistics, modes and random states stay as they were; neurons are reset.

    Raises:
        UserError: something is missing; the message lists all of it.
        Exception: what the forward pass itself raises, with a note that says how it was called.
    """
    problems = [*_wrong_attributes(model), *_wrong_output(cfg, _trial(cfg, model, device))]
    if problems:
        raise UserError(
            f"model {cfg.model} does not have what a model here needs (docs/extending.md lists it):\n  "
            + "\n  ".join(problems)
        )


def _wrong_attributes(model: nn.Module) -> Iterator[str]:
    steps = getattr(model, "T", None)
    if not isinstance(steps, int) or steps < 1:
        found = "is missing" if steps is None else f"is {steps!r}"
        yield f"T {found}: set self.T, the number of time steps for which a static image is shown"
    for name in _METHODS:
        method = getattr(model, name, None)
        if method is not None and not callable(method):
            yield f"{name} is {_kind(method)}; make it a method, or leave it out"
    sources = getattr(model, "spike_sources", None)
    if callable(sources):
        yield from _wrong_sources(sources(), set(model.modules()))


def _wrong_sources(sources: Any, parts: set[nn.Module]) -> Iterator[str]:
    if not isinstance(sources, Mapping):
        yield f"spike_sources() returns {_kind(sources)}; return a dictionary from names to submodules"
        return
    for name, module in sources.items():
        if not isinstance(name, str) or module not in parts:
            yield f"spike_sources(): {name!r} -> {type(module).__name__}, which is no submodule of the model"


def _trial(cfg: Config, model: nn.Module, device: torch.device) -> Any:
    """What the model returns in evaluation mode for two random samples of the run's size."""
    C, H, W = resolve_data(cfg).input_size
    shape = (2, cfg.time_steps, C, H, W) if dataset_facts(cfg.dataset).events else (2, C, H, W)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with _evaluation_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            return model(x)
    except Exception as error:
        error.add_note(f"This happened in a first forward pass of model {cfg.model}, with input {list(shape)}.")
        raise


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if isinstance(module, MemoryModule):  # SpikingJelly's nodes keep their state from call to call
                module.reset()


def _wrong_output(cfg: Config, output: Any) -> Iterator[str]:
    if not isinstance(output, tuple) or len(output) != 2:
        yield f"forward returns {_kind(output)}; return (logits, hook), where hook may be None"
        return
    logits = output[0]
    expected = [2, cfg.num_classes] if cfg.num_classes else [2]
    if cfg.TET:
        expected.insert(0, cfg.time_steps)
    if not isinstance(logits, Tensor):
        yield f"forward returns {_kind(logits)} as logits; return a tensor (only in training mode also a tuple of them)"
    elif not logits.is_floating_point():
        yield f"forward returns logits of {logits.dtype}; return floating-point numbers"
    elif list(logits.shape[: len(expected)]) != expected or logits.dim() != 2 + cfg.TET:
        names = "[T, B, K], one for each time step, with TET" if cfg.TET else "[B, K]"
        yield (
            f"forward returns logits {list(logits.shape)} for a batch of B = 2; return {names}: "
            f"{expected if cfg.num_classes else names}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a value of type {type(value).__name__}"
