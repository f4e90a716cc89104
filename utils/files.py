"""Files that are written whole or not at all, and the folder for what may be made again."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A file name beside `path` to write to, which is renamed to `path` when the block ends without an error.

    So `path` holds either the old content or all of the new one, whatever happens.

    Args:
        durable: wait until the content and the rename are on the disk, so that they survive a power failure.

    Raises:
        OSError: the rename failed; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
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
