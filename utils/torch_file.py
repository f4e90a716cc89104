"""Files of `torch.save`: written with a SHA-256 of their content, and read only where that, or their CRCs, agree.

`torch.load` compares no checksum: a flipped bit in a weight loads. The format is a ZIP file whose members have CRC-32s;
here its comment, at the very end, also holds a SHA-256 of all that comes before, as `unzip -z` shows. Any program that
reads torch's files reads these.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError, first_line
from utils.files import open_regular

_END = b"PK\x05\x06"
_MARK = b"SHA-256 "
_COMMENT = len(_MARK) + 64
_CHUNK = 1 << 20


class Proof(Enum):
    """What has confirmed the content of a file."""

    SHA256 = "its SHA-256"
    CRC = "the CRCs of its members"
    NOTHING = "no checksum"


def save(content: Any, file: BinaryIO) -> None:
    """Write `content` to `file`, which is empty and can be both written and read, with its SHA-256.

    Raises:
        OSError, RuntimeError: it cannot be written; torch reports a failed write as a RuntimeError.
    """
    sink = _Hashing(file)
    torch.save(content, sink)  # type: ignore[arg-type]  # it needs no more than write()
    # The last two bytes of a ZIP file without a comment are the comment's length.
    file.seek(-2, 2)
    file.write(_COMMENT.to_bytes(2, "little") + _MARK + sink.digest.hexdigest().encode())


class _Hashing:
    """A file that is written from start to end, and the digest of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def load(path: str | Path, what: str) -> tuple[Any, Proof]:
    """The content of a file, tensors on the CPU, and what has confirmed it. Never runs code from the file.

    Args:
        what: how a message begins; usually the kind of file and its path.

    Raises:
        UserError: no regular file, one that may not be read or is damaged, or one that holds more than tensors and
            plain data.
    """
    try:
        with open_regular(path) as file:
            proof = _confirmed(file)
            file.seek(0)
            # Published files carry their command line as a Namespace, which is plain data.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that sparse tensors take time; what reads them decides about them
                return torch.load(file, map_location="cpu", weights_only=True), proof
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} is not a file of tensors and plain data, and is not loaded, because reading it "
            f"could run code from it ({_refusal(error)})"
        ) from error
    except PermissionError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror}); check the rights there") from error
    except Exception as error:
        # Bytes that are no checkpoint raise many kinds of error: a text file ends in an IndexError.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} is damaged or no PyTorch file ({reason}); take another copy of it") from error


def _refusal(error: Exception) -> str:
    """Torch's reason, which comes after advice to load the file all the same."""
    found = re.search(r"WeightsUnpickler error: ([^\n]*?)(?: was not an allowed global|\n|$)", str(error))
    return found[1] if found else first_line(error)


def _confirmed(file: BinaryIO) -> Proof:
    """Compare the checksums that a file has.

    Raises:
        ValueError, zipfile.BadZipFile: one does not agree.
    """
    size = file.seek(0, 2)
    file.seek(max(size - len(_END) - 18 - _COMMENT, 0))
    tail = file.read()
    end = tail.rfind(_END)  # the record at the end of a ZIP file: 22 bytes, of which the last two count the comment's
    length, comment = int.from_bytes(tail[end + 20 : end + 22], "little"), tail[end + 22 :]
    if end >= 0 and length != len(comment):
        raise ValueError("it is cut short")
    if end >= 0 and comment.startswith(_MARK):
        if _digest(file, size - length - 2) != comment.removeprefix(_MARK).decode("ascii", "replace"):
            raise ValueError("its content does not have the SHA-256 that it was written with")
        return Proof.SHA256
    file.seek(0)
    if not zipfile.is_zipfile(file):
        return Proof.NOTHING  # torch's format before 1.6, or no file of torch
    file.seek(0)
    with zipfile.ZipFile(file) as members:
        entries = members.infolist()
        if not any(entry.CRC for entry in entries):
            return Proof.NOTHING  # torch.serialization.set_crc32_options(False)
        if (damaged := members.testzip()) is not None:
            raise ValueError(f"the CRC-32 of its member {damaged!r} does not agree")
    return Proof.CRC


def _digest(file: BinaryIO, length: int) -> str:
    """The SHA-256 of the first `length` bytes as they were before the comment was added."""
    digest, left = hashlib.sha256(), length
    file.seek(0)
    while left and (data := file.read(min(left, _CHUNK))):
        digest.update(data)
        left -= len(data)
    digest.update(bytes(2))
    return digest.hexdigest()
