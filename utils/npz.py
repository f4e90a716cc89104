"""Arrays in a file of NumPy (.npz): read whole, of the expected kind and with their CRCs, or not at all."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import first_line
from utils.files import open_regular

_MOST = 4 * 2**30  # bytes of one array; a few MB compressed can hold many times the memory of a machine
WHOLE, REAL, TEXT, BYTES = "biu", "biuf", "U", "S"  # NumPy's letters for kinds of numbers


def read_arrays(path: Path, kinds: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The arrays that `kinds` names, each of one of its kinds; pickled objects are never loaded.

    Raises:
        OSError: no regular file, or one that may not be read.
        ValueError: the file is damaged, or lacks an array of that kind; the message is the reason.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as members:
                return {name: _array(members, name, kind) for name, kind in kinds.items()}
        except Exception as error:  # damaged bytes raise many kinds of error
            reason = first_line(error) if isinstance(error, ValueError | OSError | zipfile.BadZipFile) else repr(error)
            raise ValueError(reason) from error


def _array(members: zipfile.ZipFile, name: str, kinds: str) -> NDArray[Any]:
    try:
        info = members.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array {name!r}") from None
    with members.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype.kind not in kinds or dtype.hasobject:
            raise ValueError(f"its array {name!r} is of type {dtype}")
        size = math.prod(shape) * dtype.itemsize
        if size > min(info.file_size, _MOST):
            raise ValueError(f"its array {name!r} promises {size:,} bytes, and has {info.file_size:,}")
        content = stream.read()  # to its end, where the CRC is compared
    if len(content) != size:
        raise ValueError(f"its array {name!r} has {len(content):,} bytes, {size:,} are expected")
    array: NDArray[Any] = np.frombuffer(bytearray(content), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"its arrays are of format {version}, 1.0 and 2.0 are known")
