"""Where self-attention looks: the paper's V_S and its masked form, averaged over time and heads (figures 3 and S3).

The code's `q` is the paper's V_S; the mask g(Q_S, K_S) keeps some of its channels. Averaged over T and all channels
(heads and the channels of a head), each is a map over the tokens.

Legend: T time steps, B batch, C channels, D channels of a token, H x W image, H' x W' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.measure.family import map_tensors
from utils.measure.firing import spike_sources
from utils.run.hooks import ForwardHook, hooked


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of one batch: `vs` and `masked` are [blocks, B, H', W'], mean firing rates per token."""

    vs: Tensor
    masked: Tensor


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> AttentionMaps | None:
    """The maps of every block that computes the tensors they need; None if no block does.

    `x` holds images `[B, C, H, W]` or event frames `[B, T, C, H, W]`; the maps are those of evaluation mode.
    """
    sources = spike_sources(model)
    pairs = map_tensors(sources)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() in (4, 5):
                # [T, B, D, H', W'] -> [B, H', W'] at once: the spikes themselves are not kept. With tokens in a row,
                # [T, B, D, N], the map gets the shape of the other one of its pair.
                found[name] = output.detach().float().mean(dim=(0, 2))

        return hook

    training = model.training
    model.eval()
    try:
        with hooked({name: sources[name] for pair in pairs for name in pair}, keep):
            model(x)
    finally:
        model.train(training)
    shown = [
        (found[vs], found[masked].view_as(found[vs]))
        for vs, masked in pairs
        if vs in found and masked in found and found[vs].numel() == found[masked].numel()
    ]
    if len({one.shape for pair in shown for one in pair}) != 1:
        return None
    vs, masked = (torch.stack(maps).cpu() for maps in zip(*shown, strict=True))
    return AttentionMaps(vs, masked)
