"""Runs of firing_num.py in the process of the tests, on a tiny model."""

from __future__ import annotations

import json

import torch

import firing_num
from model import sdt

TINY = """
dataset: digits
num_classes: 10
in_channels: 1
img_size: 16
layer: 2
dim: 16
num_heads: 2
mlp_ratio: 2
time_steps: 3
pooling_stat: "0011"
val_batch_size: 100
workers: 0
"""


def fresh_weights(seed):
    """The weights of a TINY model whose neurons fire."""
    torch.manual_seed(seed)
    model = sdt(img_size=16, in_channels=1, num_classes=10, embed_dims=16, num_heads=2, mlp_ratios=2,
                                   depths=2, T=3, pooling_stat="0011")  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 0.4)
    return model.state_dict()


def prepare(folder):
    """Write tiny.yml and the checkpoint a.pth.tar."""
    (folder / "tiny.yml").write_text(TINY)
    content = {"state_dict": fresh_weights(0), "state_dict_ema": fresh_weights(1), "epoch": 3}
    torch.save(content, folder / "a.pth.tar")


def run(folder, name, *argv):
    """Run in this process; status, and report.json."""
    words = ["-c", str(folder / "tiny.yml"), "--resume", str(folder / "a.pth.tar"), "--device", "cpu"]
    status = firing_num.main([*words, "--output", str(folder / "out"), "--experiment", name, *argv])
    return status, json.loads((folder / "out" / name / "report.json").read_text())
