"""Two-layer perceptron on spikes with membrane shortcuts (paper section 3.2, equation 4).

Legend: T time steps, B batch, D channels, H x W feature map.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron


class MS_MLP_Conv(nn.Module):
    """1x1 convolutions D -> hidden -> D; each neuron acts before its convolution.

    Args:
        in_features: D.
        hidden_features: channels between the two layers.
        neuron: makes a layer of neurons; called without arguments.

    Shape: membrane values `[T, B, D, H, W]` -> the same.
    """

    def __init__(self, in_features: int, hidden_features: int, *, neuron: NeuronFactory = make_neuron) -> None:
        super().__init__()
        # With equal widths the first layer has a shortcut of its own.
        self.shortcut_after_fc1 = hidden_features == in_features
        self.fc1_lif = neuron()
        self.fc1_conv = nn.Conv2d(in_features, hidden_features, kernel_size=1)
        self.fc1_bn = nn.BatchNorm2d(hidden_features)
        self.fc2_lif = neuron()
        self.fc2_conv = nn.Conv2d(hidden_features, in_features, kernel_size=1)
        self.fc2_bn = nn.BatchNorm2d(in_features)

    def forward(self, x: Tensor) -> Tensor:
        a = over_time(self.fc1_lif(x), self.fc1_conv, self.fc1_bn)  # [T, B, hidden, H, W]
        if self.shortcut_after_fc1:
            x = a = a + x
        return over_time(self.fc2_lif(a), self.fc2_conv, self.fc2_bn) + x  # [T, B, D, H, W]

    def spike_sources(self, prefix: str) -> dict[str, nn.Module]:
        """Published hook name -> the submodule whose output is that spike tensor."""
        return {f"{prefix}_fc1_lif": self.fc1_lif, f"{prefix}_fc2_lif": self.fc2_lif}
