"""The sizes that are measured, with their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_V2_15M = dict(embed_dims=(64, 128, 256, 360), T=4)
_SMALL = dict(img_size_h=32, img_size_w=32, num_classes=10, pooling_stat="0011")
# name -> arguments of the model, batch on a CPU, batch on a GPU
_SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "digits": (_SMALL | dict(in_channels=1, embed_dims=64, depths=1), 64, 256),
    "cifar": (_SMALL | dict(in_channels=3, embed_dims=512, depths=2), 16, 64),
    "imagenet-384": (dict(embed_dims=384, depths=8), 4, 64),
    "imagenet-512": (dict(embed_dims=512, depths=8), 4, 64),
    "imagenet-768": (dict(embed_dims=768, depths=8), 4, 32),
    "v2-15m-96": (_V2_15M | dict(img_size_h=96, img_size_w=96), 8, 128),
    "v2-15m": (_V2_15M, 2, 32),
}
NAMES = tuple(_SIZES)


def arguments(name: str) -> dict[str, Any]:
    """The model's arguments: digits (1 block, D = 64, 32 x 32), CIFAR 2-512, ImageNet 8-384, 8-512 and 8-768 at 224;
    V2 of 15M parameters, T = 4, at 96 and at 224."""
    return dict(_SIZES[name][0])


def is_v2(name: str) -> bool:
    return name.startswith("v2")


def batch_size(name: str, device: torch.device) -> int:
    _, on_cpu, on_gpu = _SIZES[name]
    return on_gpu if device.type == "cuda" else on_cpu


def batch(name: str, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels: no figure here depends on what the images show."""
    sizes = {"img_size_h": 224, "img_size_w": 224, "in_channels": 3, "num_classes": 1000} | arguments(name)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, sizes["in_channels"], sizes["img_size_h"], sizes["img_size_w"], generator=random)
    y = torch.randint(sizes["num_classes"], (size,), generator=random)
    return x.to(device), y.to(device)
