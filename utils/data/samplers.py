"""Which samples each process sees, in which order.

A training sample is drawn as a `Pick`, not only as an index: so the loader's workers get epoch and position too, and
the augmentation of a sample depends on (seed, epoch, position) only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One 64-bit seed from several numbers; close numbers give unrelated seeds (SplitMix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Pick(NamedTuple):
    """One drawn sample."""

    sample: int  # index in the data set
    epoch: int
    position: int  # in the epoch's order, over all ranks


class TrainSampler(Sampler[Pick]):
    """Random order per (seed, epoch), divided over the ranks: rank r gets positions r, r + world_size, ...

    Every rank gets the same number of samples: a rest is left out, in each epoch other samples.

    length:     samples in the data set
    copies:     > 1 is repeated augmentation (Hoffer et al. 2019; as in DeiT): each drawn image comes that many times
                in a row, so on different ranks, or in one batch with one rank. The length of the epoch stays the same
                (rounded down to a multiple of 256 samples, as in timm), so it has fewer different images.
    passes:     passes over the data that count as one epoch; a fraction is possible
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        copies: int = 1,
        passes: float = 1.0,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert length > 0
        assert copies >= 1
        assert passes > 0
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.copies = copies
        self.total = round(length * passes)
        if copies > 1 and self.total >= 256:
            self.total = self.total // 256 * 256
        self.epoch, self._start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the next iteration's epoch, and how many of this rank's samples it skips."""
        self.epoch, self._start = epoch, start

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, wherever the iteration starts."""
        return self.total // self.world_size

    def __iter__(self) -> Iterator[Pick]:
        epoch = self.epoch
        mine = self._order()[self.rank :: self.world_size][: len(self)].tolist()
        for i in range(self._start, len(mine)):
            yield Pick(mine[i], epoch, self.rank + i * self.world_size)

    def _order(self) -> torch.Tensor:
        """Indices in the order of this epoch over all ranks, int64 [total]."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        drawn = math.ceil(self.total / self.copies)
        permutations = [torch.randperm(self.length, generator=generator) for _ in range(math.ceil(drawn / self.length))]
        return torch.cat(permutations)[:drawn].repeat_interleave(self.copies)[: self.total]


def eval_samples(length: int, rank: int = 0, world_size: int = 1) -> range:
    """Each sample once over all ranks, in order, without padding: rank r gets r, r + world_size, ...

    Ranks may differ in length by one, so a mean over ranks must be a sum divided by the sum of counts.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    return range(rank, length, world_size)
