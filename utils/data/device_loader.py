"""Batches on the device: (images, targets), float32 [B, C, H, W] and int64 [B]; event frames are [B, T, C, H, W].

Legend: B batch, T time steps, C channels, H x W pixels.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sized

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.errors import UserError

Batch = tuple[Tensor, Tensor]


class DeviceLoader:
    """Batches moved to the device and normalised there; on CUDA the next one is copied during the step.

    statistics: mean and std per channel; None if there is nothing left to normalise
    unit: what the loader's values have as one unit of the statistics (255 for uint8 images)
    channels_last: whether the channels of each image or frame are innermost in memory
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        device: torch.device,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        unit: float = 255.0,
        channels_last: bool = False,
    ) -> None:
        self.batches, self.device, self._channels_last = batches, device, channels_last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean = self._std = torch.empty(0)
        self._normalise = statistics is not None
        if statistics is not None:
            # [1, C, 1, 1]; event frames have T before C, which broadcasts as well. Finished before they are copied: the
            # stream that reads them does not wait for the one that would compute them.
            self._mean, self._std = (
                torch.tensor(values).mul_(unit).view(1, -1, 1, 1).to(device) for values in statistics
            )

    def __len__(self) -> int:
        assert isinstance(self.batches, Sized)
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Those of the data set, of which this process may have a part; for batches of a `DataLoader`."""
        assert isinstance(self.batches, DataLoader)
        return len(self.batches.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        if self._stream is None:
            return (self._prepare(*batch) for batch in _without_traceback(self.batches))
        return self._copied_ahead(self._stream)

    def _prepare(self, images: Tensor, targets: Tensor) -> Batch:
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self._normalise:
            images = (images.float() - self._mean).div_(self._std)
        elif not images.is_floating_point():
            images = images.float()  # bytes on the wire
        if self._channels_last:
            # The format is one of 4-D tensors: of frames, the model sees [T * B, C, H, W].
            flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            images = flat.unflatten(0, images.shape[:-3])
        return images, targets

    def _copied_ahead(self, stream: torch.cuda.Stream) -> Iterator[Batch]:
        ready: Batch | None = None
        for batch in _without_traceback(self.batches):
            with torch.cuda.stream(stream):
                coming = self._prepare(*batch)
            if ready is not None:
                yield ready
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_stream(stream)
            for tensor in coming:
                tensor.record_stream(consumer)  # its memory must not be reused before the step has read it
            ready = coming
        if ready is not None:
            yield ready


def _without_traceback(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Pass on `batches`; of a UserError in a loader process, whose message arrives below a traceback, the message."""
    try:
        yield from batches
    except UserError as error:
        # The frames below hold the error and the loader in a cycle of references. Only the garbage collector would end
        # the loader's workers then, too late for their queues, and it would wait 10 seconds for each.
        traceback.clear_frames(error.__traceback__)
        message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
    else:
        return
    raise UserError(message)
