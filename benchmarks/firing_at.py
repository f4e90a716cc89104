"""Networks that fire at given rates: BatchNorm shifts are moved until each layer of neurons does.

Legend: T time steps, B batch, C channels, H x W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model import SpikeDrivenTransformer, sdt


def rates_of(model: SpikeDrivenTransformer, x: Tensor) -> dict[str, float]:
    """Published name of each spike tensor -> share of ones."""
    with torch.no_grad():
        _, hook = model(x, {})
    assert hook is not None
    return {name: float(spikes.float().mean()) for name, spikes in hook.items()}


def shifts(model: Any) -> dict[str, tuple[nn.Module, nn.BatchNorm2d]]:
    """Published name -> neurons, and the BatchNorm whose shift moves their input; in order of computation. The mask of
    the attention and what it leaves of q follow from the others."""
    sps = model.patch_embed
    found = {f"MS_SPS_lif{i}": (getattr(sps, f"proj_lif{i}"), getattr(sps, f"proj_bn{i}")) for i in ("", 1, 2, 3)}
    before = sps.rpe_bn
    for i, block in enumerate(model.block):
        attn, mlp = block.attn, block.mlp
        found[f"MS_SSA_Conv{i}_first_lif"] = (attn.shortcut_lif, before)
        for part in "qkv":
            found[f"MS_SSA_Conv{i}_{part}_lif"] = (getattr(attn, f"{part}_lif"), getattr(attn, f"{part}_bn"))
        found[f"MS_MLP_Conv{i}_fc1_lif"] = (mlp.fc1_lif, attn.proj_bn)
        found[f"MS_MLP_Conv{i}_fc2_lif"] = (mlp.fc2_lif, mlp.fc1_bn)
        before = mlp.fc2_bn
    return found


def random_network(arguments: Mapping[str, Any], x: Tensor) -> SpikeDrivenTransformer:
    """Random weights, BatchNorm statistics of the batch `x`: with the initial ones next to nothing fires."""
    torch.manual_seed(0)
    model = sdt(**arguments).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
        model(x)
    return model.eval()


@torch.no_grad()
def set_rates(model: SpikeDrivenTransformer, rates: Mapping[str, float], x: Tensor) -> None:
    """Move BatchNorm shifts, in place, until each layer of neurons fires at its rate on `x`."""
    for name, (neuron, norm) in shifts(model).items():
        currents: list[Tensor] = []
        handle = neuron.register_forward_pre_hook(lambda module, args, found=currents: found.append(args[0]))
        model(x)
        handle.remove()
        low, high = -20.0, 20.0
        for _ in range(24):
            middle = (low + high) / 2
            fired = float(neuron(currents[0] + middle).mean())
            low, high = (middle, high) if fired < rates[name] else (low, middle)
        assert norm.bias is not None
        norm.bias.add_((low + high) / 2)
