"""Readers of the two recording formats: AEDAT 2.0 (CIFAR10-DVS) and AEDAT 3.1 (DVS128 Gesture).

They give the same events as SpikingJelly's readers (a test compares them bit for bit), and replace them because that of
CIFAR10-DVS needs functions that some of the supported versions of NumPy no longer have, and that of Gesture decodes one
event at a time in Python. A truncated recording is an error here, not a shorter sample.

Formats: inivation.github.io/inivation-docs, "AEDAT file formats". Both sensors have 128 x 128 pixels.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.events.sensor import Events
from utils.files import open_regular

_SIDE = 128
_NUMBER = re.compile("[0-9]{1,15}")
_END_OF_HEADER = b"#!END-HEADER\r\n"
_POLARITY_EVENT = 1
# AEDAT 3.1: one of these before each packet of events, little endian.
_PACKET = np.dtype(
    [("type", "<u2"), ("source", "<u2")]
    + [(name, "<u4") for name in ("size", "offset", "overflow", "capacity", "number", "valid")]
)


def read_cifar10_dvs(path: Path) -> Events:
    """The events of an AEDAT 2.0 file: pairs of 32-bit address and time stamp, big endian.

    The address holds polarity in bit 0, x in bits 1-7, y in bits 8-14. The sensor was mounted such that both axes
    are mirrored and swapped in the image, and its polarity bit is 1 for OFF. Both are undone here, as in SpikingJelly.

    Raises:
        UserError: the file is truncated or holds no events.
    """
    content = _read(path)
    start = 0
    while content[start : start + 1] == b"#":
        end = content.find(b"\n", start)
        if end < 0:
            raise _damaged(path, "its header has no end")
        start = end + 1
    if (len(content) - start) % 8:
        raise _damaged(path, f"{len(content) - start} bytes of events are no multiple of 8")
    words = np.frombuffer(content, ">u4", offset=start).astype(np.int64)
    if not words.size:
        raise _damaged(path, "it holds no events")
    address, t = words[::2], words[1::2]
    row, column = (address >> 1) & 0x7F, (address >> 8) & 0x7F
    return {"t": t, "x": _SIDE - 1 - column, "y": _SIDE - 1 - row, "p": 1 - (address & 1)}


def read_gesture(path: Path) -> Events:
    """The polarity events of an AEDAT 3.1 file: packets of 32-bit data and time stamp, little endian.

    Raises:
        UserError: the file is truncated, is no AEDAT 3.1, or holds no events.
    """
    content = _read(path)
    end = content.find(_END_OF_HEADER)
    if not content.startswith(b"#!AER-DAT3.1") or end < 0:
        raise _damaged(path, "it has no AEDAT 3.1 header")
    place = end + len(_END_OF_HEADER)
    data, stamps = [], []
    while place < len(content):
        if place + _PACKET.itemsize > len(content):
            raise _damaged(path, f"it ends inside the packet header at byte {place}")
        packet = np.frombuffer(content, _PACKET, count=1, offset=place)[0]
        place += _PACKET.itemsize
        size, capacity, number = int(packet["size"]), int(packet["capacity"]), int(packet["number"])
        length = size * capacity
        if place + length > len(content):
            raise _damaged(path, f"its packet at byte {place} needs {length} bytes, {len(content) - place} are left")
        if packet["type"] == _POLARITY_EVENT:
            if size != 8 or number > capacity:
                raise _damaged(path, f"its packet at byte {place} has {number} of {capacity} events of {size} bytes")
            words = np.frombuffer(content, "<u4", count=2 * number, offset=place).astype(np.int64)
            data.append(words[::2])
            stamps.append(words[1::2] | int(packet["overflow"]) << 31)
        place += length
    if not data:
        raise _damaged(path, "it holds no events")
    events, t = np.concatenate(data), np.concatenate(stamps)
    return {"t": t, "x": (events >> 17) & 0x7FFF, "y": (events >> 2) & 0x7FFF, "p": (events >> 1) & 1}


def read_gesture_labels(path: Path) -> NDArray[np.int64]:
    """Rows [n, 3] of a Gesture recording: class 1 to 11, start and end in microseconds.

    Raises:
        UserError: a line is not of that form.
    """
    rows = []
    lines = _read(path).decode("ascii", "replace").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.split(",")
        if (
            len(fields) != 3
            or not all(_NUMBER.fullmatch(field.strip()) for field in fields)
            or not 1 <= int(fields[0]) <= 11
        ):
            raise UserError(f"{path}, line {number}: {line!r} is not class (1 to 11), start and end in microseconds")
        rows.append([int(field) for field in fields])
    if not rows:
        raise _damaged(path, "it lists no gestures")
    return np.array(rows, np.int64)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); extract it again") from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; delete it and extract it again from its archive")
