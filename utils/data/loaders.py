"""Batches on the device, the same for CPU and CUDA.

A batch is (images, targets): float32 [B, C, H, W], normalised, and int64 [B], both on the device. Event data gives
frames [B, T, C, H, W]: counts, normalised only where mean or std are set. With
`aug_splits` = S the images are [S * B, C, H, W], first all clean ones, then each augmented copy of the batch,
and the targets are repeated alike.

Training batches depend on (seed, epoch) only: not on the number of workers, earlier epochs in the same process, or an
interruption. That holds bit for bit on one machine with the same versions of the libraries.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data.random_erasing import RandomErasing
from torch.utils.data import BatchSampler, DataLoader, Dataset

from utils.config.settings import Config
from utils.data.datasets import build_dataset, build_datasets, dataset_facts, resolve_data
from utils.data.device_loader import Batch, DeviceLoader
from utils.data.facts import DataSettings, ImageSet
from utils.data.mixing import check_boxes
from utils.data.samplers import Pick, TrainSampler, eval_samples, mix_seed
from utils.data.workers import start_worker
from utils.errors import UserError


@dataclass
class Loaders:
    """What a training run iterates over."""

    train: DeviceLoader
    eval: DeviceLoader
    data: DataSettings
    split_hash: str | None  # of event data
    samples: int  # of the training set
    _sampler: TrainSampler
    _batch_size: int

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that `train` iterates next; it then yields the batches from `start_batch` on.

        `len(train)` stays the number of batches in a whole epoch.
        """
        self._sampler.set_epoch(epoch, start_batch * self._batch_size)


def build_loaders(
    cfg: Config, *, device: torch.device, rank: int = 0, world_size: int = 1, numbered: bool = False
) -> Loaders:
    """Open both splits and build their loaders; UserError for settings that do not fit the data.

    `batch_size` and `val_batch_size` count samples per process. Call `set_epoch` before each epoch. With `numbered`, a
    training target is the pair of label and number of the sample in its set, int64 [B, 2].
    """
    check_boxes(cfg, *resolve_data(cfg).input_size[1:])
    with _first_rank_first(rank):
        train_set, eval_set = build_datasets(cfg)
    sampler = _train_sampler(cfg, len(train_set), rank, world_size)
    erasing = None
    if cfg.reprob > 0 and not cfg.no_aug:
        erasing = RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device="cpu")
    samples = SeededSamples(train_set, seed=cfg.seed, erasing=erasing, spare_first_copy=cfg.resplit, numbered=numbered)
    # The type stubs know samplers of bare indices only.
    batches = BatchSampler(sampler, cfg.batch_size, drop_last=True)  # type: ignore[arg-type]
    return Loaders(
        train=_device_loader(cfg, samples, batches, device),
        eval=_eval_loader(cfg, eval_set, device, rank, world_size),
        data=resolve_data(cfg),
        split_hash=getattr(train_set, "split_hash", None),
        samples=len(train_set),
        _sampler=sampler,
        _batch_size=cfg.batch_size,
    )


def build_eval_loader(cfg: Config, *, device: torch.device, rank: int = 0, world_size: int = 1) -> DeviceLoader:
    """The evaluation loader alone: it needs no training files. Each sample comes once over all ranks."""
    with _first_rank_first(rank):
        dataset = build_dataset(cfg, training=False)
    return _eval_loader(cfg, dataset, device, rank, world_size)


@contextmanager
def _first_rank_first(rank: int) -> Iterator[None]:
    # Rank 0 downloads, converts or indexes while the others wait: two would do it twice, or damage the archive.
    # On the CPUs and for as long as it takes: NCCL's own wait ends after 10 minutes.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None
    if rank > 0 and group is not None:
        dist.barrier(group=group)
    try:
        yield
    finally:
        if rank == 0 and group is not None:
            dist.barrier(group=group)


def _train_sampler(cfg: Config, length: int, rank: int, world_size: int) -> TrainSampler:
    if cfg.aug_repeats > 1 and cfg.epoch_repeats > 0:
        raise UserError("aug_repeats and epoch_repeats both repeat samples; set one of them to 0")
    copies, passes = max(cfg.aug_repeats, 1), cfg.epoch_repeats or 1.0
    sampler = TrainSampler(length, seed=cfg.seed, rank=rank, world_size=world_size, copies=copies, passes=passes)
    if len(sampler) < cfg.batch_size:
        raise UserError(
            f"batch_size: {cfg.batch_size} is more than the {len(sampler)} training samples of each of the "
            f"{world_size} processes, and an incomplete batch is not trained on; use a smaller one"
        )
    return sampler


def _eval_loader(cfg: Config, dataset: ImageSet, device: torch.device, rank: int, world_size: int) -> DeviceLoader:
    batches = BatchSampler(eval_samples(len(dataset), rank, world_size), cfg.val_batch_size, drop_last=False)
    return _device_loader(cfg, dataset, batches, device)


def _device_loader(cfg: Config, dataset: Any, batches: BatchSampler, device: torch.device) -> DeviceLoader:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.workers,
        collate_fn=collate,
        worker_init_fn=functools.partial(start_worker, plugins=cfg.plugin_modules),
        pin_memory=cfg.pin_mem is not False and device.type == "cuda",  # without a GPU, pinning only warns
        persistent_workers=cfg.workers > 0,  # what use_multi_epochs_loader asks for
        # The loader draws a seed at each start: from this generator, not from the random state of the run.
        generator=torch.Generator().manual_seed(cfg.seed),
    )
    data = resolve_data(cfg)
    normalise, unit = data.normalise_on_device, 255.0
    if dataset_facts(cfg.dataset).events:
        normalise, unit = cfg.mean is not None or cfg.std is not None, 1.0
    return DeviceLoader(loader, device, (data.mean, data.std) if normalise else None, unit, bool(cfg.channels_last))


class SeededSamples(Dataset[Any]):
    """A training set that seeds Python, NumPy and PyTorch for each sample, and restores their state after a batch.

    The augmentations use all three.
    spare_first_copy: with `aug_splits`, no random erasing in the first copy, which is clean otherwise
    numbered: each target becomes the pair (target, number of the sample)
    """

    def __init__(
        self,
        dataset: ImageSet,
        *,
        seed: int,
        erasing: RandomErasing | None = None,
        spare_first_copy: bool = False,
        numbered: bool = False,
    ) -> None:
        self.dataset, self.seed, self._numbered = dataset, seed, numbered
        self._erasing, self._spare_first_copy = erasing, spare_first_copy

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pick: Pick) -> tuple[Any, Any]:
        return self.__getitems__([pick])[0]

    def __getitems__(self, picks: list[Pick]) -> list[tuple[Any, Any]]:
        """The samples of one batch; the DataLoader calls this, so the state is saved once per batch."""
        with _kept_random_state():
            return [self._sample(pick) for pick in picks]

    def _sample(self, pick: Pick) -> tuple[Any, Any]:
        _seed_all(mix_seed(self.seed, pick.epoch, pick.position))
        images, target = self.dataset[pick.sample]
        return self._erase(images), (target, pick.sample) if self._numbered else target

    def _erase(self, images: Any) -> Any:
        if self._erasing is None:
            return images
        if not isinstance(images, tuple):
            return self._erasing(images)
        first = images[0] if self._spare_first_copy else self._erasing(images[0])
        return (first, *(self._erasing(copy) for copy in images[1:]))


@contextmanager
def _kept_random_state() -> Iterator[None]:
    # Without workers this runs in the main process, whose own random numbers must not depend on it.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too


def collate(samples: list[tuple[Any, Any]]) -> Batch:
    """Stack samples to (images [B, C, H, W], targets int64 [B]), or [S * B, ...] for tuples of S images.

    Event frames [T, C, H, W] become [B, T, C, H, W].
    """
    targets = torch.tensor([target for _, target in samples], dtype=torch.int64)
    if not isinstance(samples[0][0], tuple):
        return torch.stack([torch.as_tensor(image) for image, _ in samples]), targets
    copies = list(zip(*(images for images, _ in samples), strict=True))  # S tuples of B images
    images = torch.stack([torch.as_tensor(image) for copy in copies for image in copy])
    return images, targets.repeat(len(copies))
