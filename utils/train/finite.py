"""Numbers that are not finite: whether there are any, and where the first one comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    """The first module, in order of execution, whose output is not finite, in words.

    If there is none, the BatchNorm layers that saw no variance, each of which multiplies a gradient by 1 / sqrt(eps);
    empty if there are none of these either.
    """
    if not bool(torch.isfinite(x).all()):
        return "the input batch itself is not finite"
    found: list[str] = []
    constant: dict[str, float] = {}

    def watch(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, _BatchNorm) and module.training and _is_constant(args[0]):
                constant[name] = module.eps**-0.5
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    model = unwrapped(model)
    with hooked({name: module for name, module in model.named_modules() if name}, watch), precision.autocast():
        model(x)
    if found:
        return f"the first output that is not finite is that of {found[0]}"
    if not constant:
        return ""
    number, (first, factor) = len(constant), next(iter(constant.items()))
    return (
        f"all outputs are finite, but {number} BatchNorm layers (the first one {first}) see one value in the "
        f"whole batch, since no neuron before them fires; each multiplies the gradient by up to "
        f"1 / sqrt(eps) = {factor:.0f}: use fewer heads, larger images, more time steps or bn_init_bias 0.5"
    )


def _is_constant(x: Tensor) -> bool:
    """Whether each channel of `x` `[N, C, ...]` has one value."""
    dims = [0, *range(2, x.dim())]
    return bool(torch.equal(x.amax(dim=dims), x.amin(dim=dims)))
