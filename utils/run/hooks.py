"""Forward hooks on a model that are removed again, also after an error."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from torch import nn

# Called after a module's forward with the module, its positional arguments and its output.
ForwardHook = Callable[[nn.Module, Any, Any], None]


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], make: Callable[[str], ForwardHook]) -> Iterator[None]:
    """Keep the hook `make(name)` on each of `modules` while it is entered."""
    with contextlib.ExitStack() as attached:
        for name, module in modules.items():
            attached.callback(module.register_forward_hook(make(name)).remove)
        yield


class Recorder(ABC):
    """Has hooks on some modules while it is entered, and keeps what they recorded."""

    @abstractmethod
    def _attached(self) -> contextlib.AbstractContextManager[None]:
        """The hooks: on while this is entered."""

    def __enter__(self) -> Self:
        self._hooks = self._attached()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
