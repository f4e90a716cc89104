"""One image file to a PIL image, and the data sets that need no more: embedded digits, sets of the Hugging Face hub.

Each gives (PIL image or what its `transform` makes of it, class index). A damaged image is an error, never replaced by
another one: each sample counts once.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError, first_line
from utils.npz import WHOLE, read_arrays


def pil_mode(channels: int) -> str:
    """Pillow's mode of images with so many channels: 'L' (grey) or 'RGB'."""
    return "L" if channels == 1 else "RGB"


def decode(file: IO[bytes], mode: str, name: str) -> Image.Image:
    """Decode `file` to `mode` ('L' or 'RGB'), whatever it holds (palette, alpha, CMYK).

    name: what to call it in a message

    Raises:
        UserError: it is no image, or a damaged one. It is never replaced by another one: each sample counts once.
    """
    try:
        image = Image.open(file)
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(
            f"data_dir: {name} is damaged (not an image that Pillow knows); replace or remove it"
        ) from error
    except Exception as error:  # Pillow's decoders of damaged files raise many kinds
        raise UserError(f"data_dir: {name} is damaged ({first_line(error)}); replace or remove it") from error
    try:
        return to_mode(image, mode)
    except ValueError as error:
        raise UserError(f"data_dir: {name}: {error}; save it with 8 bits for each channel") from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` as 'L' or 'RGB'. Grey of 16 bits keeps its upper 8, as Pillow reads colours of 16 bits.

    Raises:
        ValueError: its mode has no 8-bit form: of 32-bit numbers the file does not say which one is white.
    """
    # Before version 11, Pillow reads 16-bit grey of these formats as 32 bits. Its own conversion cuts off at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of 32 bits (mode {image.mode!r}), whose range is not known")
    return image.convert(mode)


class DigitsDataset:
    """The embedded handwritten digits as grey ('L') 8 x 8 PIL images; see data/README.md."""

    def __init__(self, file: Path, *, train: bool) -> None:
        """Raises OSError or ValueError: the file cannot be read, or holds something else."""
        content = read_arrays(file, {"images": WHOLE, "labels": WHOLE, "is_test": "b"})
        images, labels, is_test = content["images"], content["labels"], content["is_test"]
        if images.shape != (len(images), 8, 8) or not len(images) == labels.size == is_test.size:
            raise ValueError(f"images {list(images.shape)} and {labels.size} labels, expected [N, 8, 8] and N")
        if not (0 <= images.min() <= images.max() <= 16 and 0 <= labels.min() <= labels.max() <= 9):
            raise ValueError("grey levels outside of 0 to 16, or labels outside of 0 to 9")
        chosen = is_test.ravel() != train
        # 17 grey levels to 0..255: paper is 0, full ink is 255.
        self.images: np.ndarray = (images[chosen].astype(np.uint16) * 255 // 16).astype(np.uint8)
        self.labels: np.ndarray = labels.ravel()[chosen].astype(np.int64)
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


class HubDataset:
    """A data set of the Hugging Face hub, as timm's reader opens it."""

    def __init__(self, reader: Any, name: str, mode: str, classes: int) -> None:
        self.reader, self.name, self.mode, self.classes = reader, name, mode, classes
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            image = decode(file, self.mode, f"{self.name}, sample {index},")
        if not isinstance(label, int) or not 0 <= label < self.classes:
            raise UserError(
                f"dataset {self.name!r}: sample {index} has label {label!r}, which does not fit num_classes "
                f"{self.classes} (valid: 0 to {self.classes - 1}); choose a labelled split or set num_classes"
            )
        return self.transform(image) if self.transform else image, label
