"""A neuron of your own: the parallel spiking neuron, PSN (Fang et al., NeurIPS 2023): H = W X, S = step(H - B).

It has no reset, so it computes all time steps at once. W `[T, T]` and B `[T]` are learned. Needs neuron_args: {T: ...}.
"""

import torch
from torch import Tensor, nn

from module.neuron import register_neuron


class PSN(nn.Module):
    def __init__(self, T: int, surrogate_function: nn.Module, v_threshold: float = 1.0) -> None:
        super().__init__()
        self.v_threshold = v_threshold  # measurement finds neurons by this attribute
        self.fire = surrogate_function
        # At first W is a leaky integrator (tau = 2) without reset: 1/2 for this time step, 1/4 for the one before, ...
        delay = torch.arange(T).unsqueeze(1) - torch.arange(T)  # [T, T]
        self.weight = nn.Parameter(torch.where(delay >= 0, 0.5 ** (delay + 1.0), 0.0))
        self.threshold = nn.Parameter(torch.full((T, 1), v_threshold))

    def forward(self, x: Tensor) -> Tensor:
        h = self.weight @ x.flatten(1) - self.threshold  # [T, B*...]
        return self.fire(h).view_as(x)


register_neuron("psn", PSN)
