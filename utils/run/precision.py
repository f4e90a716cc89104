"""Mixed precision: autocast, loss scaling, gradient clipping and the optimizer's step, in one place."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.config.settings import Config
from utils.errors import UserError

# When a gradient is not finite, loss scaling skips the update and halves its scale. Float16 has numbers from 2**-24 to
# 2**16: after 40 halvings, a gradient that was just small enough at the last update has become 0.
MOST_SKIPPED_UPDATES = 40


def leaves_updates_out(optimizer: Optimizer) -> bool:
    """Whether a flag on the device can make the optimizer leave an update out; else the host would have to read it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Precision:
    """How forward and backward passes of a run compute.

    Without `amp`, float32 throughout; with `allow_tf32` CUDA multiplies with 10 bits of mantissa. With `amp`,
    autocast to bfloat16, or to float16 with loss scaling on CUDA (the published runs). Neurons keep a float32 state
    unless `neuron_dtype` says otherwise.

    Raises:
        UserError: float16 on a CPU, where fast kernels are missing.

    Attributes:
        skipped_updates: how many updates in a row loss scaling has skipped until now; on the device, since reading it
            makes the host wait. Without loss scaling it stays 0.
    """

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.device = device
        self.enabled = cfg.amp
        # torch's own default is to allow it in convolutions.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cfg.allow_tf32
        names = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        by_default = "float16" if device.type == "cuda" else "bfloat16"
        self.dtype = names[by_default if cfg.amp_dtype == "auto" else cfg.amp_dtype]
        if self.enabled and device.type == "cpu" and self.dtype is torch.float16:
            raise UserError("amp_dtype: 'float16' needs a CUDA device; use bfloat16 or auto on a CPU")
        self.clip_grad = cfg.clip_grad
        self.clip_mode = cfg.clip_mode
        scaling = self.enabled and self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaling)
        self.skipped_updates = torch.zeros((), dtype=torch.int64, device=device)
        self._one = torch.ones((), device=device)

    def advice(self) -> str | None:
        """A line for the log where another setting is recommended."""
        if not (self.enabled and self.dtype is torch.float16 and self.device.type == "cuda"):
            return None
        return (
            "amp: float16 needs loss scaling, which leaves out some updates; "
            "on GPUs of compute capability 8.0 and later, amp_dtype: bfloat16 is recommended, which needs none"
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, optimizer: Optimizer, model: nn.Module, finite: Tensor | None = None) -> None:
        """Unscale, clip and apply the gradients, then clear them.

        On CUDA nothing is read from the device, if the optimizer can leave an update out by a flag there.

        Args:
            finite: a flag on the device; where it is false, such an optimizer leaves the update out. Loss scaling looks
                at the gradients itself.
        """
        if self.clip_grad is not None:
            self.scaler.unscale_(optimizer)
            dispatch_clip_grad(list(model.parameters()), self.clip_grad, mode=self.clip_mode)
        if self.scaler.is_enabled():
            scale = self._scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            self.skipped_updates.add_(1).mul_(self._scale() < scale)
        elif finite is not None and finite.is_cuda and leaves_updates_out(optimizer):
            flagged: Any = optimizer
            # torch's protocol between loss scaling and its fused optimizers.
            flagged.grad_scale, flagged.found_inf = None, (~finite).float()
            optimizer.step()
            del flagged.grad_scale, flagged.found_inf
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _scale(self) -> Tensor:
        scaled = self.scaler.scale(self._one)  # get_scale() would wait for the device
        assert isinstance(scaled, Tensor)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
