"""Make digits.npz, the embedded set, from scikit-learn's copy of the UCI handwritten digits.

    python data/digits/make_digits.py [FILE]

Needs scikit-learn, which only this script uses. Running it again gives the same bytes.
The file holds, for the 1,797 samples in scikit-learn's order (see data/README.md for the source and licence):
    images   uint8 [1797, 8, 8]   0 (paper) to 16 (ink): ink pixels counted in 4x4 cells of a 32x32 scan
    labels   uint8 [1797]         the digit
    is_test  bool  [1797]         the fixed split: 360 test samples, the other 1,437 train
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TEST_SAMPLES = 360
SPLIT_SEED = 0


def stratified_test_mask(labels: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Choose `samples` of [N] labels so that each class keeps its share; bool [N].

    Classes get the whole part of their share, the largest remainders one more each (ties: the lower class).
    """
    counts = np.bincount(labels)
    shares = counts * samples / len(labels)
    quota = shares.astype(int)
    by_remainder = np.argsort(quota - shares, kind="stable")
    quota[by_remainder[: samples - quota.sum()]] += 1
    # RandomState, because NumPy guarantees its stream for ever; that of default_rng may change.
    generator = np.random.RandomState(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for digit, wanted in enumerate(quota):
        members = np.flatnonzero(labels == digit)
        mask[generator.permutation(members)[:wanted]] = True
    return mask


def main(target: Path) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = source.images.astype(np.uint8)
    labels = source.target.astype(np.uint8)
    is_test = stratified_test_mask(labels, TEST_SAMPLES, SPLIT_SEED)
    # Not compressed: the bytes would depend on the version of zlib.
    np.savez(target, images=images, labels=labels, is_test=is_test)
    print(f"{target}: {len(labels)} samples, {is_test.sum()} of them test")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.npz"))
