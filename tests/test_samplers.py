"""The order of the samples: complete, equal over ranks, and resumable in mid-epoch."""

from __future__ import annotations

import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from utils.data.samplers import Pick, TrainSampler, eval_samples, mix_seed


def picks(length: int, *, epoch: int = 0, start: int = 0, **options: float) -> list[Pick]:
    sampler = TrainSampler(length, **{"seed": 1, **options})  # type: ignore[arg-type]
    sampler.set_epoch(epoch, start)
    return list(sampler)


def samples(length: int, **options: float) -> list[int]:
    return [pick.sample for pick in picks(length, **options)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("length", [360, 361, 1])
def test_evaluation_covers_each_sample_once(length: int, world_size: int) -> None:
    shards = [eval_samples(length, rank, world_size) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_shards_are_disjoint_and_equal(world_size: int) -> None:
    shards = [samples(100, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {100 // world_size}
    assert len({i for shard in shards for i in shard}) == 100 // world_size * world_size


def test_one_rank_sees_every_sample() -> None:
    assert sorted(samples(100)) == list(range(100))


def test_positions_are_unique_over_ranks_and_name_the_same_sample_for_any_world_size() -> None:
    alone = {pick.position: pick.sample for pick in picks(100)}
    shared = [pick for rank in range(4) for pick in picks(100, rank=rank, world_size=4)]
    assert {pick.position: pick.sample for pick in shared} == alone


def test_order_changes_with_epoch_and_seed_and_repeats_with_both() -> None:
    first = samples(100)
    assert first == samples(100)
    assert first != samples(100, epoch=1)
    assert first != samples(100, seed=2)
    # A sum of seed and epoch would make these two equal.
    assert samples(100, seed=2, epoch=1) != samples(100, seed=1, epoch=2)


@pytest.mark.parametrize("start", [0, 8, 32, 33])
def test_a_start_in_mid_epoch_gives_the_tail(start: int) -> None:
    options = {"rank": 1, "world_size": 3}
    assert picks(100, epoch=5, start=start, **options) == picks(100, epoch=5, **options)[start:]


def test_the_next_epoch_starts_at_its_beginning() -> None:
    sampler = TrainSampler(10, seed=0)
    sampler.set_epoch(3, start=4)
    assert len(list(sampler)) == 6
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(sampler) == 10


def test_set_epoch_while_iterating_leaves_that_epoch_alone() -> None:
    sampler = TrainSampler(10, seed=0)
    iterator = iter(sampler)
    next(iterator)
    sampler.set_epoch(1)
    assert {pick.epoch for pick in iterator} == {0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [256, 1000])
def test_repeated_augmentation_follows_timm(length: int, world_size: int) -> None:
    dataset = range(length)
    for rank in range(world_size):
        theirs = RepeatAugSampler(dataset, num_replicas=world_size, rank=rank, num_repeats=3)
        ours = TrainSampler(length, seed=0, rank=rank, world_size=world_size, copies=3)
        assert len(list(ours)) == len(ours) == len(theirs)


def test_repeated_augmentation_puts_the_copies_on_different_ranks() -> None:
    shards = [picks(300, rank=rank, world_size=3, copies=3) for rank in range(3)]
    for copies in zip(*shards, strict=True):
        assert len({pick.sample for pick in copies}) == 1
        assert len({pick.position for pick in copies}) == 3  # each is augmented differently


def test_repeated_augmentation_with_fewer_samples_than_its_rounding() -> None:
    drawn = samples(10, copies=3)
    assert [drawn.count(i) for i in dict.fromkeys(drawn)] == [3, 3, 3, 1]


@pytest.mark.parametrize(("passes", "counts"), [(2.0, {2}), (0.5, {0, 1}), (1.5, {1, 2})])
def test_passes_scale_the_epoch(passes: float, counts: set[int]) -> None:
    drawn = samples(10, passes=passes)
    assert len(drawn) == 10 * passes
    assert {drawn.count(i) for i in range(10)} == counts


def test_mixed_seeds_do_not_collide() -> None:
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > 7990  # what NumPy is seeded with
