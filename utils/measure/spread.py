"""How operations and energy differ between samples: mean, standard deviation, interval, extremes, by class as well."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

Z95 = 1.959964  # of the standard normal distribution
INTERVAL = "95% interval of the mean, mean ± 1.96 sd / √n (normal approximation)"


@dataclass(frozen=True)
class Spread:
    """The values of some samples. The standard deviation is that of a sample (n - 1)."""

    samples: int
    mean: float
    sd: float | None  # None for one sample, as is the interval
    mean_interval: tuple[float, float] | None  # `INTERVAL`
    minimum: float
    maximum: float

    @staticmethod
    def of(values: Tensor) -> Spread:
        """`values` `[samples]`, at least one."""
        values = values.double()
        n, mean = len(values), float(values.mean())
        if n < 2:
            return Spread(n, mean, None, None, mean, mean)
        sd = float(values.std())
        half = Z95 * sd / math.sqrt(n)
        return Spread(n, mean, sd, (mean - half, mean + half), float(values.min()), float(values.max()))


@dataclass(frozen=True)
class PerSample:
    """Charged operations and energy of each sample of an evaluation."""

    operations: Spread
    energy_pJ: Spread
    worst: int  # the sample that takes the most energy: its place in the data set
    by_class: dict[int, tuple[Spread, Spread]]  # operations and energy, by label

    @staticmethod
    def of(operations: Tensor, energy_pJ: Tensor, labels: Tensor | None = None) -> PerSample:
        """From `[samples]` each, `labels` the classes of the samples."""
        classes = {} if labels is None else {int(label): labels == label for label in labels.unique()}
        return PerSample(
            Spread.of(operations),
            Spread.of(energy_pJ),
            int(energy_pJ.argmax()),
            {label: (Spread.of(operations[of]), Spread.of(energy_pJ[of])) for label, of in classes.items()},
        )

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        return {
            "interval": INTERVAL,
            "operations": asdict(self.operations),
            "energy_pJ": asdict(self.energy_pJ),
            "worst_sample": self.worst,
            "by_class": [
                {"class": label, "operations": asdict(operations), "energy_pJ": asdict(energy)}
                for label, (operations, energy) in self.by_class.items()
            ],
        }
