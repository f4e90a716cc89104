"""Files that are written whole or not at all, and the folder for what may be made again."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

UNFINISHED = ".partial"  # how the names of files end that are being written


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A file name beside `path` to write to, which is renamed to `path` when the block ends without an error.

    So `path` holds either the old content or all of the new one, whatever happens.

    Args:
        durable: wait until the content and the rename are on the disk, so that they survive a power failure.

    Raises:
        OSError: the rename failed; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Some network file systems, and Windows, cannot; the rename itself is atomic there too.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: there is none, it may not be read, or it is a folder, a pipe or a device, which could be read for ever.
    """
    # Opening a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "it is no regular file", str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text in a regular file.

    Raises:
        OSError: as `open_regular`.
        UnicodeDecodeError: it is no UTF-8.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def cache_folder() -> Path:
    """`$SDT_CACHE_DIR`, else `spike-driven-transformer` in the user's cache folder; compiled kernels lie there too.

    Raises:
        UserError: the user has no home folder.
    """
    if folder := os.environ.get("SDT_CACHE_DIR"):
        return Path(folder)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError(f"there is no home folder for the cache ({error}); set SDT_CACHE_DIR") from error
    return base / "spike-driven-transformer"
