"""LAMB without a number that the host must read or compute in each update.

timm's LAMB counts its updates on the host, and loss scaling must then ask the device at each update whether it may
call it: the host waits for the whole backward pass, and the device afterwards for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor


class DeviceLamb(Lamb):
    """timm's LAMB (You et al. 2020, algorithm 2, with the gradient's norm clipped first), with the count of updates on
    the device. torch's loss scaling gives it `grad_scale` and `found_inf` there: gradients are divided by the first,
    and where the second is not 0 everything stays as it was, the count too.

    Takes timm's arguments; `caution`, `decoupled_decay` and `corrected_weight_decay` are not implemented.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; parameters of one dtype, on one device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        every = [p for parameters in used for p in parameters]
        if not every:
            return loss
        gradients = [p.grad for p in every]
        keep: Tensor | float = 1.0
        found: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        if found is not None:
            keep = (found == 0).to(gradients[0].dtype)
            # Not by multiplication: 0 times infinity is not 0.
            gradients = [torch.nan_to_num(g, 0.0, 0.0, 0.0) * keep for g in gradients]
        most = self.defaults["max_grad_norm"]
        if most is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            gradients = list(torch._foreach_div(gradients, (norm / most).clamp_(min=1.0)))
        for group, parameters in zip(self.param_groups, used, strict=True):
            if parameters:
                self._update(group, parameters, gradients[: len(parameters)], keep)
            gradients = gradients[len(parameters) :]
        return loss

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], keep: Tensor | float
    ) -> None:
        """`keep` 1 updates, 0 leaves all as it is."""
        like, count = parameters[0], group.get("step", 0.0)
        if not isinstance(count, Tensor):
            count = torch.full((), count, dtype=torch.float64, device=like.device)
        # In place from the second update on: a CUDA graph repeats it on the same memory.
        group["step"] = count.to(like.device, torch.float64, non_blocking=True).add_(keep)
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        means = [self.state[p]["exp_avg"] for p in parameters]
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        first, second = group["betas"]
        share = 1 - first if group["grad_averaging"] else 1.0

        torch._foreach_mul_(means, 1 - (1 - first) * keep)
        torch._foreach_add_(means, torch._foreach_mul(gradients, share))
        torch._foreach_mul_(squares, 1 - (1 - second) * keep)
        torch._foreach_add_(squares, torch._foreach_mul(torch._foreach_mul(gradients, gradients), 1 - second))

        roots = torch._foreach_sqrt(squares)
        if group["bias_correction"]:
            counted = group["step"].clamp(min=1)  # before the first update that is made
            torch._foreach_div_(roots, (1 - second**counted).sqrt().to(like.dtype))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        if group["bias_correction"]:
            torch._foreach_div_(updates, (1 - first**counted).to(like.dtype))

        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
        if group["weight_decay"] != 0 or group["always_adapt"]:
            sizes = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(updates))
            ratios = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0)
            if group["trust_clip"]:
                ratios.clamp_(max=1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_mul_(updates, -group["lr"] * keep)
        torch._foreach_add_(parameters, updates)
