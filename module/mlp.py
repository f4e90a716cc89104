"""Two-layer perceptron on spikes with membrane shortcuts (paper section 3.2, equation 4).

Legend: T time steps, B batch, D channels, H x W feature map.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.kernels.fused import norm_add, norm_neuron, over_time
from module.neuron import make_neuron


class MS_MLP_Conv(nn.Module):
    """1x1 convs D -> hidden -> D; each neuron acts before its conv.

    Shape: membrane values `[T, B, D, H, W]` -> the same.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        spike_mode: str = "lif",
        backend: str = "auto",
        neuron_dtype: str = "float32",
    ) -> None:
        super().__init__()
        # With equal widths the first layer has a shortcut of its own.
        self.shortcut_after_fc1 = hidden_features == in_features
        self.fc1_lif = make_neuron(spike_mode, backend=backend, neuron_dtype=neuron_dtype)
        self.fc1_conv = nn.Conv2d(in_features, hidden_features, kernel_size=1)
        self.fc1_bn = nn.BatchNorm2d(hidden_features)
        self.fc2_lif = make_neuron(spike_mode, backend=backend, neuron_dtype=neuron_dtype)
        self.fc2_conv = nn.Conv2d(hidden_features, in_features, kernel_size=1)
        self.fc2_bn = nn.BatchNorm2d(in_features)

    def forward(self, x: Tensor) -> Tensor:
        a = over_time(self.fc1_conv, self.fc1_lif(x))  # [T, B, hidden, H, W]
        if self.shortcut_after_fc1:
            x = norm_add(self.fc1_bn, a, x, self.fc1_lif)
            s = self.fc2_lif(x)
        else:
            s = norm_neuron(self.fc1_bn, self.fc2_lif, a)
        return norm_add(self.fc2_bn, over_time(self.fc2_conv, s), x, self.fc2_lif)  # [T, B, D, H, W]

    def spike_sources(self, prefix: str) -> dict[str, nn.Module]:
        """Published hook name -> the submodule whose output is that spike tensor."""
        return {f"{prefix}_fc1_lif": self.fc1_lif, f"{prefix}_fc2_lif": self.fc2_lif}
