"""One image file to a PIL image, and the data sets that need no more: embedded digits, sets of the Hugging Face hub.

Each gives (PIL image or what its `transform` makes of it, class index). A damaged image is an error, never replaced by
another one: each sample counts once.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError


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
        with Image.open(file) as image:
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise UserError(
            f"data_dir: {name} is damaged (not an image that Pillow knows); replace or remove it"
        ) from error
    # Pillow's decoders of damaged files raise more than OSError.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"data_dir: {name} is damaged ({error}); replace or remove it") from error


class DigitsDataset:
    """The embedded handwritten digits as grey ('L') 8 x 8 PIL images; see data/README.md."""

    def __init__(self, file: Path, *, train: bool) -> None:
        # Opened here, because numpy does not close a damaged file.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            chosen = content["is_test"] != train
            # 17 grey levels to 0..255: paper is 0, full ink is 255.
            self.images: np.ndarray = (content["images"][chosen].astype(np.uint16) * 255 // 16).astype(np.uint8)
            self.labels: np.ndarray = content["labels"][chosen].astype(np.int64)
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
