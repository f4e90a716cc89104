"""One image file to a PIL image."""

from __future__ import annotations

import struct
from typing import IO

from PIL import Image, UnidentifiedImageError

from utils.errors import UserError


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
