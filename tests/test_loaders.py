"""Batches: shapes, that they depend on (seed, epoch) alone, and that every evaluation sample comes once."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup

from utils.config.parse import config_from, parse_config
from utils.config.settings import Config
from utils.data import loaders as loaders_module
from utils.data.device_loader import Batch, DeviceLoader
from utils.data.loaders import Loaders, build_eval_loader, build_loaders, collate
from utils.data.mixing import build_mixup
from utils.data.samplers import Pick
from utils.errors import UserError

CPU = torch.device("cpu")
DIGITS_CONFIG = Path(__file__).resolve().parent.parent / "conf" / "digits" / "1_64_15E_t4.yml"
# Every source of randomness: torchvision's flips and jitter, timm's crops and RandAugment, random erasing.
AUGMENTED = {"hflip": 0.0, "vflip": 0.5, "aa": "rand-m9-n2-mstd0.5-inc1", "reprob": 0.5, "remode": "pixel"}


def digits_config(**settings: Any) -> Config:
    image = {"dataset": "digits", "num_classes": 10, "in_channels": 1, "img_size": 16, "hflip": 0.0}
    defaults = {**image, "batch_size": 64, "val_batch_size": 50, "workers": 0}
    return config_from({**defaults, **settings})


def loaders(*, rank: int = 0, world_size: int = 1, device: torch.device = CPU, **settings: Any) -> Loaders:
    cfg = digits_config(**settings)
    return build_loaders(cfg, device=device, rank=rank, world_size=world_size)


def epoch_of(built: Loaders, epoch: int, start_batch: int = 0, count: int = 3) -> list[Batch]:
    built.set_epoch(epoch, start_batch)
    return [batch for batch, _ in zip(built.train, range(count), strict=False)]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("size", [16, 32])
def test_shapes_types_and_lengths(size: int) -> None:
    built = loaders(img_size=size)
    assert built.data.input_size == (1, size, size)
    train, evaluation = list(built.train), list(built.eval)
    assert {images.shape for images, _ in train} == {(64, 1, size, size)}
    assert [len(images) for images, _ in evaluation] == [50] * 7 + [10]
    for images, targets in train + evaluation:
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (len(built.train), len(built.eval)) == (len(train), len(evaluation)) == (1437 // 64, 8)


@pytest.mark.parametrize("reprob", [0.0, 0.5])
def test_augmented_batches_do_not_depend_on_the_workers(reprob: float) -> None:
    settings = {**AUGMENTED, "reprob": reprob}
    alone = epoch_of(loaders(**settings), 2)
    assert_equal(alone, epoch_of(loaders(**settings), 2))
    assert_equal(alone, epoch_of(loaders(**settings, workers=2), 2))


def test_workers_that_stay_alive_learn_the_epoch() -> None:
    built = loaders(**AUGMENTED, workers=2)
    uninterrupted = [epoch_of(built, epoch, count=100) for epoch in (0, 1)]
    assert_equal(uninterrupted[1], epoch_of(loaders(**AUGMENTED), 1, count=100))
    assert not torch.equal(uninterrupted[0][0][0], uninterrupted[1][0][0])


def test_a_start_in_mid_epoch_gives_the_batches_that_were_left() -> None:
    built = loaders(**AUGMENTED)
    whole, rest = epoch_of(built, 4, count=100), epoch_of(built, 4, start_batch=20, count=100)
    assert_equal(whole[20:], rest)
    assert len(built.train) == len(whole)


def test_the_seed_changes_order_and_augmentation() -> None:
    (images, targets), (other_images, other_targets) = (
        epoch_of(loaders(**AUGMENTED, seed=seed), 0, count=1)[0] for seed in (1, 2)
    )
    assert not torch.equal(targets, other_targets)
    assert not torch.equal(images, other_images)


def test_a_sample_is_augmented_anew_in_each_epoch_and_at_each_position() -> None:
    samples: Any = loaders(**AUGMENTED).train.batches.dataset  # type: ignore[attr-defined]
    picks = [Pick(7, epoch, position) for epoch in (0, 1) for position in (0, 1)]
    images = [samples[pick][0] for pick in picks]
    assert len({image.numpy().tobytes() for image in images}) == 4
    assert torch.equal(samples[picks[0]][0], images[0])


def test_copies_of_repeated_augmentation_differ() -> None:
    images, targets = epoch_of(loaders(**AUGMENTED, aug_repeats=3), 0, count=1)[0]
    assert torch.equal(targets[0:63:3], targets[1:63:3])
    assert not torch.equal(images[0:63:3], images[1:63:3])


def test_loading_leaves_the_random_state_of_the_run_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    built = loaders(**AUGMENTED)
    seed()
    expected = draw()
    seed()
    epoch_of(built, 0)
    list(built.eval)
    assert draw() == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_sample_once_over_ranks(world_size: int) -> None:
    ranks = [loaders(rank=rank, world_size=world_size).eval for rank in range(world_size)]
    targets = torch.cat([targets for loader in ranks for _, targets in loader])
    assert targets.bincount().tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]


def test_the_evaluation_loader_is_the_same_alone() -> None:
    cfg = {
        "dataset": "digits",
        "num_classes": 10,
        "in_channels": 1,
        "img_size": 16,
        "workers": 0,
        "val_batch_size": 50,
    }
    assert_equal(list(build_eval_loader(config_from(cfg), device=CPU)), list(loaders().eval))


def test_normalising_on_the_device_equals_normalising_in_the_workers() -> None:
    on_device, in_workers = loaders(vflip=0.5), loaders(vflip=0.5, no_prefetcher=True)
    assert on_device.data.normalise_on_device
    assert not in_workers.data.normalise_on_device
    difference = 0.0
    for (images, _), (others, _) in zip(
        epoch_of(on_device, 0) + list(on_device.eval),
        epoch_of(in_workers, 0) + list(in_workers.eval),
        strict=True,
    ):
        difference = max(difference, float((images - others).abs().max()))
    print(f"largest difference: {difference:.2e}")
    assert difference < 1e-5


def test_normalised_training_images_have_mean_zero_and_standard_deviation_one() -> None:
    # Nearest-neighbour enlargement keeps the statistics of the 8 x 8 images.
    built = loaders(no_aug=True, interpolation="nearest", img_size=16)
    images = torch.cat([images for images, _ in built.train])
    assert float(images.mean()) == pytest.approx(0, abs=0.01)
    assert float(images.std()) == pytest.approx(1, abs=0.01)


def test_aug_splits_come_copy_after_copy() -> None:
    plain = {"scale": [1, 1], "ratio": [1, 1], "train_interpolation": "bicubic", "no_prefetcher": True}
    built = loaders(**plain, aug_splits=3, aa="rand-m9-n3-inc1", batch_size=8)
    images, targets = epoch_of(built, 0, count=1)[0]
    assert images.shape == (24, 1, 16, 16)
    assert torch.equal(targets, targets[:8].repeat(3))
    clean, _ = epoch_of(loaders(**plain, color_jitter=0.0, batch_size=8), 0, count=1)[0]
    assert torch.equal(images[:8], clean)
    assert not torch.equal(images[8:16], images[16:])


@pytest.mark.parametrize("resplit", [True, False])
def test_resplit_spares_the_clean_copies_from_erasing(resplit: bool) -> None:
    settings = {"aug_splits": 2, "aa": "rand-m1-n1", "batch_size": 8, "scale": [1, 1], "ratio": [1, 1]}
    settings |= {"train_interpolation": "bicubic", "no_prefetcher": True}
    erased, _ = epoch_of(loaders(**settings, reprob=1.0, remode="pixel", resplit=resplit), 0, count=1)[0]
    whole, _ = epoch_of(loaders(**settings), 0, count=1)[0]
    assert torch.equal(erased[:8], whole[:8]) == resplit
    assert not torch.equal(erased[8:], whole[8:])


def test_without_augmentation_nothing_is_erased() -> None:
    settings = {"no_aug": True, "interpolation": "nearest", "no_prefetcher": True}
    assert_equal(epoch_of(loaders(**settings, reprob=1.0), 0), epoch_of(loaders(**settings), 0))


def test_settings_reach_random_erasing() -> None:
    dataset: Any = loaders(reprob=0.3, remode="rand", recount=4).train.batches.dataset  # type: ignore[attr-defined]
    erasing = dataset._erasing
    assert (erasing.probability, erasing.max_count, erasing.rand_color, erasing.per_pixel) == (0.3, 4, True, False)
    everywhere, _ = epoch_of(loaders(**AUGMENTED | {"reprob": 1.0, "aa": None}), 0, count=1)[0]
    nowhere, _ = epoch_of(loaders(**AUGMENTED | {"reprob": 0.0, "aa": None}, no_prefetcher=True), 0, count=1)[0]
    assert not any(torch.equal(one, other) for one, other in zip(everywhere, nowhere, strict=True))


def test_epoch_repeats_lengthen_the_epoch() -> None:
    assert len(loaders(epoch_repeats=2.0).train) == 2 * 1437 // 64


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_than_one_batch_is_trained_in_tiny_sets(workers: int) -> None:
    built = loaders(batch_size=1437, workers=workers)
    assert [len(images) for images, _ in built.train] == [1437]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_set_smaller_than_a_batch_is_refused(world_size: int) -> None:
    samples = 1437 // world_size
    with pytest.raises(UserError, match=f"batch_size: {samples + 1} is more than the {samples} training samples"):
        loaders(batch_size=samples + 1, world_size=world_size)


@pytest.mark.parametrize("batch_size", [50, 36])  # leaves 37, 33
def test_an_odd_rest_of_the_epoch_meets_no_mixup(batch_size: int) -> None:
    settings = {"mixup": 0.5, "cutmix": 1.0, "batch_size": batch_size}
    mixup = build_mixup(digits_config(**settings))
    assert 1437 % batch_size % 2 == 1
    assert mixup is not None
    sizes = [len(mixup(images, targets)[1]) for images, targets in loaders(**settings).train]
    assert sizes == [batch_size] * (1437 // batch_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_odd_batches_are_evaluated_beside_mixup(world_size: int) -> None:
    ranks = [loaders(mixup=0.5, val_batch_size=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [targets for built in ranks for _, targets in built.eval]
    assert max(map(len, batches)) == 7
    assert sum(map(len, batches)) == 360


def test_no_workers_and_the_batch_of_the_evaluation_by_command_line() -> None:
    words = ["-c", str(DIGITS_CONFIG), "-j", "0", "-b", "30", "-vb", "77"]
    built = build_loaders(parse_config(words, prog="train.py", description=""), device=CPU)
    assert built.train.batches.num_workers == built.eval.batches.num_workers == 0  # type: ignore[attr-defined]
    assert len(next(iter(built.train))[1]) == 30
    assert [len(targets) for _, targets in built.eval] == [77] * 4 + [52]


@pytest.mark.parametrize(("rank", "order"), [(0, ["open", "barrier"]), (1, ["barrier", "open"])])
def test_the_first_process_downloads_indexes_or_converts_before_the_others(
    monkeypatch: pytest.MonkeyPatch, rank: int, order: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(loaders_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loaders_module.dist, "new_group", lambda **options: options)
    waits: list[dict[str, object]] = []
    monkeypatch.setattr(loaders_module.dist, "barrier", lambda group: (done.append("barrier"), waits.append(group))[0])
    with loaders_module._first_rank_first(rank):
        done.append("open")
    assert done == order
    # NCCL would give up after 10 minutes; a conversion takes longer.
    assert [(group["backend"], group["timeout"].days >= 1) for group in waits] == [("gloo", True)]


def test_two_ways_of_repeating_samples_exclude_each_other() -> None:
    with pytest.raises(UserError, match="aug_repeats and epoch_repeats both repeat samples"):
        loaders(aug_repeats=3, epoch_repeats=2.0)


def test_the_training_set_sent_to_spawned_workers_gives_the_same_samples() -> None:
    here = loaders(**AUGMENTED).train.batches.dataset  # type: ignore[attr-defined]
    there = pickle.loads(pickle.dumps(here))
    picks = [Pick(sample, 3, position) for position, sample in enumerate((5, 900, 5))]
    for (image, label), (other, other_label) in zip(here.__getitems__(picks), there.__getitems__(picks), strict=True):
        assert torch.equal(torch.as_tensor(image), torch.as_tensor(other))
        assert label == other_label


def test_collate_keeps_odd_last_batches() -> None:
    images, targets = collate([(np.zeros((3, 5, 7), np.uint8), 1)] * 3)
    assert (images.shape, images.dtype, targets.tolist()) == ((3, 3, 5, 7), torch.uint8, [1, 1, 1])


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"cutmix_minmax": [0.2, 0.8]}])
def test_mixup_is_built_where_the_settings_ask_for_it(settings: dict[str, Any]) -> None:
    mixup = build_mixup(digits_config(**settings, smoothing=0.2))
    assert isinstance(mixup, Mixup)
    images, targets = mixup(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 3]))
    assert (images.shape, targets.shape) == ((4, 1, 16, 16), (4, 10))
    assert torch.allclose(targets.sum(1), torch.ones(4))


def test_mixup_is_left_out_where_they_do_not() -> None:
    assert build_mixup(config_from({"mixup": 0.0})) is None
    ends = digits_config(mixup=0.5, mixup_off_epoch=2)
    assert [build_mixup(ends, epoch) is None for epoch in range(4)] == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"pin_mem": True, "workers": 2}, {"no_prefetcher": True}])
def test_batches_on_cuda_equal_those_on_the_cpu(settings: dict[str, Any]) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    built = loaders(**settings, vflip=0.5, device=cuda)
    there = []
    for images, targets in built.train:
        assert images.device == targets.device == cuda
        torch.cuda._sleep(1_000_000)  # a slow step: a copy that runs ahead must not overwrite this batch
        there.append((images.cpu(), targets.cpu()))
    for (images, targets), (others, other_targets) in zip(there, loaders(vflip=0.5).train, strict=True):
        assert torch.allclose(images, others, atol=1e-5)
        assert torch.equal(targets, other_targets)


def test_a_loader_of_plain_batches_moves_them() -> None:
    # What a set that normalises nothing (event frames [B, T, C, H, W]) goes through.
    batch = (torch.rand(2, 4, 2, 8, 8), torch.tensor([1, 0]))
    assert_equal(list(DeviceLoader([batch], CPU)), [batch])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 2, 8, 8)])
def test_batches_have_the_channels_innermost_where_that_is_asked_for(shape: tuple[int, ...]) -> None:
    batch = (torch.rand(shape), torch.tensor([1, 0]))
    ((images, _),) = DeviceLoader([batch], CPU, channels_last=True)
    assert images.stride(-3) == 1
    assert torch.equal(images, batch[0])
