"""A data set of your own: noise with white rows (class 1) or white columns (class 0)."""

import numpy as np

from utils.data.register import register_dataset


class Stripes:
    def __init__(self, cfg, training: bool) -> None:
        self.length, self.part = (1000, 0) if training else (200, 1)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.random.default_rng((self.part, index)).integers(0, 128, (8, 8), dtype=np.uint8)
        label = index % 2
        (image if label else image.T)[index % 4 :: 4] = 255
        return image, label


register_dataset("stripes", Stripes, classes=2, input_size=(1, 8, 8), mean=(0.4,), std=(0.3,))
