"""Activation checkpointing: keep a block's input only, and compute the block again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_again_in_backward(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, keeping `x` alone for the backward pass."""
    contexts = (contextlib.nullcontext(), _without_running_statistics(block))
    y: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)
    return y


@contextlib.contextmanager
def _without_running_statistics(block: nn.Module) -> Iterator[None]:
    """The second forward pass sees the same batch: it must not enter the running statistics twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, count in before]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, tracked), count in zip(norms, before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)
