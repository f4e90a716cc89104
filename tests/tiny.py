"""A model small enough for a test, and weights with which all of its layers fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import SpikeDrivenTransformer, sdt, sdt_arguments
from module.accelerate import accelerate
from module.neuron import make_neuron

TINY: dict[str, Any] = dict(
    img_size_h=16, img_size_w=16, num_classes=5, embed_dims=16, num_heads=4, depths=1, mlp_ratios=2, T=2
)

# The smallest run of train.py, as YAML to which a test adds its own settings.
TINY_RUN = """
dataset: digits
num_classes: 10
in_channels: 1
img_size: 8
layer: 1
dim: 16
num_heads: 2
time_steps: 2
pooling_stat: "0011"
batch_size: 240
warmup_epochs: 0
"""
FEW_DIGITS = Path(__file__).parent / "golden" / "few_digits.txt"  # 24 training samples of each class


def quick(run: str) -> str:
    """A run with fewer samples, in as many steps, and without proofs: for tests that depend on neither."""
    assert "batch_size: 240" in run
    return run.replace("batch_size: 240", "batch_size: 48") + f"kernels: plain\ntrain_split_path: {FEW_DIGITS}\n"


def tiny(kind: type[SpikeDrivenTransformer] | None = None, **arguments: Any) -> SpikeDrivenTransformer:
    arguments = TINY | {"pooling_stat": "0011"} | arguments
    return sdt(**arguments) if kind is None else kind(**sdt_arguments(**arguments))


def lively(model: nn.Module) -> nn.Module:
    """Scale weights up so that every layer fires: freshly initialised ones leave the neurons silent. Biases,
    0 at first, are drawn."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(2.5)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(std=1 / (module.weight[0].numel() ** 0.5))
                if module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3)
    return model


def neuron_on(backend: str, mode: str = "lif", **settings: Any) -> nn.Module:
    """A layer of neurons on one backend, without the proof: the tests compare them themselves."""
    return accelerate(make_neuron(mode, **settings), neuron_backend=backend, prove=False)


class Linear(nn.Module):
    """A model of one layer with the calling convention of the real one."""

    def __init__(self, classes=7, steps=0):
        super().__init__()
        torch.manual_seed(0)
        self.steps = steps
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x, hook=None):
        logits = self.head(self.stem(x))
        if self.steps:  # [T, B, K], different at each step
            logits = torch.stack([logits * (t + 1) for t in range(self.steps)])
        return logits, hook
