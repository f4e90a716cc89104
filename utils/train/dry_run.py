"""How long a run would take: the time of a few steps, multiplied."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from utils.run.console import clock, logger, peak_memory
from utils.run.evaluation import evaluate
from utils.train.step import train_one_epoch
from utils.train.trainer import Trainer

# The first steps are slow: algorithms are chosen, memory is allocated, loader processes start.
_WARM_UP, _TIMED = 2, 5


class _Timed:
    """Passes on the first batches of a loader, and notes when each was asked for."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.islice(self._batches, _WARM_UP + _TIMED):
            self.times.append(self._now())
            yield batch
        self.times.append(self._now())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds_per_batch(self) -> float:
        """The median over the steps after the warm-up, or over all where there are no more."""
        durations = [after - before for before, after in itertools.pairwise(self.times)]
        return statistics.median(durations[_WARM_UP:] or durations)


def estimate(trainer: Trainer) -> None:
    """Run a few training and evaluation steps, log times and memory, and write nothing."""
    process, state = trainer.process, trainer.state
    trainer.loaders.set_epoch(trainer.start_epoch)
    training = _Timed(trainer.loaders.train, process.device)
    train_one_epoch(trainer.train_step(trainer.start_epoch), training, trainer.steps, process)
    evaluation = _Timed(trainer.loaders.eval, process.device)
    evaluate(trainer.compiled, evaluation, state.precision, process)

    step = training.seconds_per_batch()
    epoch = step * trainer.steps + evaluation.seconds_per_batch() * len(trainer.loaders.eval)
    images = trainer.cfg.batch_size * process.world_size
    epochs = trainer.num_epochs - trainer.start_epoch
    logger.info(f"step: {step * 1000:.1f} ms, {images / step:.0f} images/s (median of a few steps)")
    logger.info(f"epoch: {clock(epoch)} for {trainer.steps} training steps and the evaluation")
    logger.info(f"run: {clock(epoch * epochs)} for {epochs} epochs; peak memory {peak_memory(process.device)}")
    if trainer.need is not None:
        logger.info(f"memory of a process: {trainer.need}")
