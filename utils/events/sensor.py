"""A simulated event camera: it turns moving images into events (t, x, y, polarity).

The pixel is that of the dynamic vision sensor (Lichtsteiner, Posch and Delbruck, IEEE J. Solid-State Circuits 43(2),
2008): it remembers a log intensity and fires when the present one is a contrast threshold away, ON above and OFF
below, then remembers the level it fired at. Crossing times are interpolated between two rendered images, as in ESIM
(Rebecq, Gehrig and Scaramuzza, CoRL 2018); thresholds differ from pixel to pixel, events inside the refractory time
are lost and background noise is Poisson, as in v2e (Hu, Liu and Delbruck, CVPR Workshops 2021).

Legend: B images, H x W pixels, t microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Events = dict[str, NDArray[np.int64]]  # t in microseconds, ascending; x; y; p: 1 ON, 0 OFF; all of one length


@dataclass(frozen=True)
class EventSensor:
    """One camera. `seed` determines the thresholds of its pixels; each recording has noise of its own."""

    height: int
    width: int
    threshold: float = 0.4  # mean contrast threshold, in natural log intensity
    mismatch: float = 0.04  # its standard deviation over the pixels
    refractory: int = 500  # microseconds after an event in which the pixel gives no other
    noise_rate: float = 1.0  # background events per pixel and second
    seed: int = 0

    def thresholds(self) -> Floats:
        """Contrast thresholds [2, H, W], OFF and ON; at least a tenth of their mean."""
        generator = np.random.RandomState(self.seed)
        drawn = generator.normal(self.threshold, self.mismatch, (2, self.height, self.width))
        return np.maximum(drawn, 0.1 * self.threshold)

    def record(
        self, intensity: Callable[[float], Floats], duration: int, step: int, noise_seeds: Sequence[tuple[int, ...]]
    ) -> list[Events]:
        """Record B scenes at once and return the events of each.

        Args:
            intensity: t in microseconds -> linear intensities [B, H, W], positive.
            duration: of the recording, in microseconds.
            step: time between two rendered images, in microseconds.
            noise_seeds: B seeds, so that the noise of a scene does not depend on the other scenes.
        """
        thresholds = self.thresholds()
        before = np.log(intensity(0.0))
        assert before.shape == (len(noise_seeds), self.height, self.width), before.shape
        level = before.copy()  # log intensity at which each pixel gave its last event
        last = np.full(before.shape, -np.inf)  # when it fired last
        found: list[NDArray[np.int64]] = []  # [5, n]: scene, t, x, y, p
        for start in range(0, duration, step):
            stop = min(start + step, duration)
            after = np.log(intensity(float(stop)))
            found += self._crossings(before, after, level, last, thresholds, start, stop)
            before = after
        events = np.concatenate([*found, np.empty((5, 0), np.int64)], axis=1)
        return [
            self._in_order(events[1:, events[0] == scene], self._noise(seed, duration))
            for scene, seed in enumerate(noise_seeds)
        ]

    def _crossings(
        self, before: Floats, after: Floats, level: Floats, last: Floats, thresholds: Floats, start: int, stop: int
    ) -> list[NDArray[np.int64]]:
        """The events between two images; `level` and `last` [B, H, W] are brought up to date."""
        found = []
        for polarity, sign in ((0, -1.0), (1, 1.0)):
            threshold = thresholds[polarity]
            # A level is crossed when it lies between that of the last event and the present intensity.
            crossings = np.floor(sign * (after - level) / threshold)
            for k in range(1, int(crossings.max(initial=0.0)) + 1):
                scene, y, x = np.nonzero(crossings >= k)
                crossed = level[scene, y, x] + sign * k * threshold[y, x]
                seen, now = before[scene, y, x], after[scene, y, x]
                # Rounding may put a level just outside the interval it was crossed in.
                share = np.clip((crossed - seen) / (now - seen), 0.0, 1.0)
                time = start + share * (stop - start)
                awake = time - last[scene, y, x] >= self.refractory
                scene, y, x, time = scene[awake], y[awake], x[awake], time[awake]
                last[scene, y, x] = time
                rounded = np.rint(time).astype(np.int64)
                found.append(np.stack([scene, rounded, x, y, np.full_like(scene, polarity)]))
            level += sign * np.maximum(crossings, 0.0) * threshold
        return found

    def _noise(self, seed: tuple[int, ...], duration: int) -> NDArray[np.int64]:
        """Background events [4, n]: t, x, y, p; uniform in time, place and polarity."""
        generator = np.random.RandomState(list(seed))
        count = generator.poisson(self.noise_rate * duration * 1e-6 * self.height * self.width)
        limits = (duration, self.width, self.height, 2)
        return np.stack([generator.randint(0, limit, count) for limit in limits]).astype(np.int64)

    @staticmethod
    def _in_order(signal: NDArray[np.int64], noise: NDArray[np.int64]) -> Events:
        t, x, y, p = np.concatenate([signal, noise], axis=1)
        order = np.argsort(t, kind="stable")
        return {"t": t[order], "x": x[order], "y": y[order], "p": p[order]}
