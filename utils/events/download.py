"""The archives of an event data set: fetched where they are missing, checked by their MD5, extracted.

An archive is (name, address, MD5).
"""

from __future__ import annotations

import shutil
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

from utils.errors import UserError
from utils.events.files import make_folder, progress_bar
from utils.files import replacing

_TIMEOUT = 60  # seconds without an answer


def fetch(archives: list[tuple[str, str, str]], folder: Path) -> None:
    """Download the archives that are missing or damaged in `folder`, each whole and with the right MD5, or not at all.

    Raises:
        UserError: the host does not answer, sends something else, or the disk is full.
    """
    make_folder(folder)
    for name, url, md5 in archives:
        if check_integrity(folder / name, md5):
            continue
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none
        try:
            with replacing(folder / name) as partial:
                download_url(url, folder, partial.name)
                if (found := calculate_md5(partial)) != md5:
                    raise UserError(
                        f"{url} sent something else than {name} (MD5 {found}, expected {md5}); put it there by hand"
                    )
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"{url} cannot be downloaded to {folder} ({error}; {free / 2**30:.1f} GiB free); "
                f"try again, or put {name} there by hand"
            ) from error
        finally:
            socket.setdefaulttimeout(before)


def check_archives(archives: list[tuple[str, str, str]], folder: Path) -> None:
    """UserError that lists every archive that is missing from `folder` or has another MD5."""
    wrong = []
    for name, url, md5 in archives:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing: MD5 {md5}, {url}")
        elif (found := calculate_md5(path)) != md5:
            wrong.append(f"{name} ({path.stat().st_size:,} bytes) has MD5 {found}, expected {md5}: download it again")
    if wrong:
        raise UserError("\n    ".join([f"{folder}: {len(wrong)} file(s) missing or damaged:", *wrong]))


def extract(archive: Path, target: Path) -> None:
    """Unpack the files that are missing in `target`, each whole or not at all; `archive` may also be another file."""
    if archive.suffix not in (".zip", ".gz"):
        return
    base = target.resolve()
    try:
        with progress_bar(None, f"extract {archive.name}", "file") as bar:
            for name, size, open_member in _members(archive):
                bar.update()
                path = (target / name).resolve()
                if not path.is_relative_to(base):
                    raise UserError(
                        f"{archive} holds {name!r}, which points outside of {target}; it is not the original"
                    )
                if path.is_file() and path.stat().st_size == size:
                    continue
                make_folder(path.parent)
                with open_member() as read, replacing(path) as partial, partial.open("wb") as write:
                    shutil.copyfileobj(read, write, 1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be extracted to {target} ({error}); check it and the free space") from error


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: file.open(info)  # type: ignore[misc]
        return
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.size, lambda member=member: tar.extractfile(member)  # type: ignore[misc]
