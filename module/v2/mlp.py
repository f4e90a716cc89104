"""The MLP of V2, on tokens.

Legend: T time steps, B batch, C channels, H x W feature map, N = H*W tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron


class MLP(nn.Module):
    """Convolutions of one token, C -> hidden -> C; each neuron acts before its convolution.

    Args:
        in_features: C.
        hidden_features: channels between the two layers.
        neuron: makes a layer of neurons; called without arguments.

    Shape: membrane values `[T, B, C, H, W]` -> the same; the shortcut is the caller's.
    """

    def __init__(self, in_features: int, hidden_features: int, *, neuron: NeuronFactory = make_neuron) -> None:
        super().__init__()
        self.fc1_lif = neuron()
        self.fc1_conv = nn.Conv1d(in_features, hidden_features, kernel_size=1)
        self.fc1_bn = nn.BatchNorm1d(hidden_features)
        self.fc2_lif = neuron()
        self.fc2_conv = nn.Conv1d(hidden_features, in_features, kernel_size=1)
        self.fc2_bn = nn.BatchNorm1d(in_features)

    def forward(self, x: Tensor) -> Tensor:
        a = over_time(self.fc1_lif(x.flatten(3)), self.fc1_conv, self.fc1_bn)  # [T, B, hidden, N]
        b = over_time(self.fc2_lif(a), self.fc2_conv, self.fc2_bn)  # [T, B, C, N]
        return b.unflatten(3, x.shape[3:])
