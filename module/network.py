"""What the networks of all versions have in common: how they are called, and how their spikes are recorded.

Legend: T time steps, B batch, C channels, H x W image, D features, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from module.grad_checkpointing import run_again_in_backward

Hook = dict[str, Tensor]


class SpikingNetwork(nn.Module):
    """A network of images or event frames that returns `(logits, hook)`.

    A derived class writes `forward_features`, `forward_head` and `spike_sources`.

    Args:
        in_channels: C.
        T: how often a static image is shown. Event data brings its own T.
        TET: keep the logits of each time step, `[T, B, K]`, for the TET loss.
        data_T: whether 5-D inputs may have another number of time steps than `T` (they are taken as they are).

    Raises:
        ValueError: `in_channels` or `T` is less than 1.
    """

    def __init__(self, *, in_channels: int, T: int, TET: bool = False, data_T: bool = True) -> None:
        super().__init__()
        check_least(in_channels=(in_channels, 1), T=(T, 1))
        self.T = T
        self.data_T = data_T
        self.TET = TET
        self.in_channels = in_channels
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or event frames -> membrane values averaged over space, `[T, B, D]`."""
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Any:
        """Membrane values `[T, B, D]` -> logits `[B, K]`, or `[T, B, K]` with TET."""
        raise NotImplementedError

    def spike_sources(self) -> dict[str, nn.Module]:
        """Name -> the submodule whose output is that spike tensor, in order of computation.

        Measurements attach forward hooks to these; the forward pass itself knows nothing of them.
        """
        raise NotImplementedError

    def _check_size(self, height: int, width: int) -> None:
        """Raises ValueError for an image that the network cannot take."""

    def _to_time_first(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` or event frames `[B, T, C, H, W]` -> `[T, B, C, H, W]`."""
        if x.dim() not in (4, 5):
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.dim()} dimensions; expected images [B, C, H, W] "
                "or event frames [B, T, C, H, W]"
            )
        if x.shape[-3] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.shape[-3]} channels, the model in_channels={self.in_channels}"
            )
        self._check_size(*x.shape[-2:])
        if x.dim() == 4:
            return x.unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        if x.shape[1] != self.T and not self.data_T:
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.shape[1]} time steps, the model T={self.T}; "
                "build the model with that T, or with data_T=True to take T from the data"
            )
        return x.transpose(0, 1)

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """`block(x)`; with gradient checkpointing it keeps `x` alone for the backward pass."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return run_again_in_backward(block, x)
        y: Tensor = block(x)
        return y

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass and compute the block again there: less memory,
        one more forward pass of the blocks, the same gradients. (The name is timm's.)"""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, hook: Hook | None = None) -> tuple[Any, Hook | None]:
        """Logits, and the spike tensors if asked for.

        Args:
            x: images `[B, C, H, W]` or event frames `[B, T, C, H, W]`.
            hook: a dictionary to fill with every spike tensor, detached, `[T, B, ...]`, under its published name.

        Returns:
            what `forward_head` returns, and `hook`.

        Raises:
            ValueError: wrong number of dimensions, channels or time steps, or a size that the network cannot take.
        """
        if hook is None:
            return self.forward_head(self.forward_features(x)), None

        def recorder(name: str) -> Any:
            return lambda module, args, output: hook.update({name: output.detach()})

        handles = [m.register_forward_hook(recorder(name)) for name, m in self.spike_sources().items()]
        try:
            return self.forward_head(self.forward_features(x)), hook
        finally:
            for handle in handles:
                handle.remove()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's optimizer factory asks for it: nothing beyond biases and 1-D tensors is exempt."""
        return set()


def check_least(**values: tuple[int, int]) -> None:
    """ValueError unless each value, given with the least valid one, is a whole number of at least that."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
