"""What a faster way to compute a part of the model consists of, and when it may run.

A substitute is a subclass of the plain class of one part. It is attached to a finished model by setting `__class__`, so
parameters, state-dict keys, hooks, deep copies and pickles stay what they were. Its forward asks at each call whether
it may run, and falls back to the plain class's forward where it may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from module.fingerprint import edited, found

# Device, dtype of the input, dtype of autocast (None: off), and whether the part is in training mode.
Context = tuple[torch.device, torch.dtype, torch.dtype | None, bool]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user sees: that of the part without its substitute."""
    return getattr(type(module), "plain_class", type(module))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def watched(*modules: nn.Module) -> bool:
    """Whether a hook is attached to any of the modules (or to all there are), or one's forward was replaced."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    # What torch.compile traces is the module's own forward; it cannot look into an instance's dictionary either.
    replaced = not torch.compiler.is_compiling() and any("forward" in vars(m) for m in modules)
    return replaced or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


class Substitute(nn.Module):
    """Named before the plain class: `class FastMLP(Substitute, MS_MLP_Conv)`.

    Attributes:
        plain_class: the one class that this stands for.
        runs_as: how the log calls it.
        stands_for: `module:Class.method` -> fingerprint, of each function whose work `fast_forward` does.
        gradient_tolerance: error of a gradient, relative to the largest, that is allowed beside twice that of the
            plain computation.
        proved: where the numbers were compared with the plain forward; None: everywhere, without proof.
    """

    plain_class: ClassVar[type[nn.Module]]
    runs_as: ClassVar[str]
    stands_for: ClassVar[dict[str, str]]
    gradient_tolerance: float = 0.0
    proved: frozenset[Context] | None = frozenset()
    _functions: ClassVar[tuple[tuple[Any, str, Any], ...]] = ()

    def __init_subclass__(cls) -> None:
        if "stands_for" in vars(cls):
            places = [found(name) for name in cls.stands_for]
            cls._functions = tuple((owner, name, getattr(owner, name)) for owner, name in places)

    @classmethod
    def edited(cls) -> list[str]:
        """The functions that differ from those this was written for."""
        return edited(cls.stands_for)

    def forward(self, x: Tensor) -> Tensor:
        if self.may_run(x):
            return self.fast_forward(x)
        return super().forward(x)

    def fast_forward(self, x: Tensor) -> Tensor:
        """What the plain class's forward computes."""
        raise NotImplementedError

    @classmethod
    def computes(cls, dtype: torch.dtype, settings: Mapping[str, Any]) -> bool:
        """Whether inputs of `dtype` can be computed at all by the substitute with these attributes."""
        return True

    @classmethod
    def seen(cls, context: Context) -> Context:
        """`context` without what makes no difference to this substitute."""
        return context

    def may_run(self, x: Tensor) -> bool:
        """Whether nobody replaced a function of this part, and the numbers were compared for an input like `x`."""
        if not torch.compiler.is_compiling():
            own = vars(self)
            for owner, name, function in self._functions:
                if name in own or getattr(owner, name) is not function:
                    return False
        if self.proved is None:
            return True
        return self.seen((x.device, x.dtype, autocast_dtype(x.device.type), self.training)) in self.proved
