"""Event counts as colours, the same in every picture: ON blue, OFF vermilion, on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Apart for colour-blind readers and in grey print (Okabe & Ito).
_OFF, _ON = np.array([213, 94, 0]), np.array([0, 114, 178])
_FULL = 0.99  # quantile of the counts above zero that gets the full colour: a single hot pixel must not fade the rest


def colour(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """Counts [..., 2, H, W], OFF before ON -> RGB [..., H, W, 3]: the stronger a polarity, the less paper shows."""
    positive = frames[frames > 0]
    full = float(np.quantile(positive, _FULL)) if positive.size else 1.0
    off, on = np.moveaxis(np.clip(frames / full, 0.0, 1.0), -3, 0)[..., None]  # [..., H, W, 1] each
    ink = off * (255 - _OFF) + on * (255 - _ON)
    return np.asarray(np.clip(255 - ink, 0, 255).round().astype(np.uint8))
