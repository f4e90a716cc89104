"""Numbers that are not finite: whether there are any, and where the first one comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.run.hooks import ForwardHook, hooked
from utils.run.precision import Precision


def read_later(flags: Tensor) -> Callable[[], list[bool]]:
    """Start copying booleans to the host now; read them when called.

    On CUDA the copy waits in the queue behind what computes them, so the host need not wait before it is called.
    """
    if not flags.is_cuda:
        return lambda: flags.tolist()
    host = flags.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[bool]:
        copied.synchronize()
        return host.tolist()

    return read


def unwrapped(model: nn.Module) -> nn.Module:
    for wrapper in ("module", "_orig_mod"):  # data-parallel training, torch.compile
        model = getattr(model, wrapper, model)
    return model


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, x: Tensor, precision: Precision) -> str:
    """The first module, in order of execution, whose output is not finite, in words; empty if there is none."""
    if not bool(torch.isfinite(x).all()):
        return "the input batch itself is not finite"
    found: list[str] = []

    def watch(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    model = unwrapped(model)
    with hooked({name: module for name, module in model.named_modules() if name}, watch), precision.autocast():
        model(x)
    return f"the first output that is not finite is that of {found[0]}" if found else ""
