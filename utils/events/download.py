"""The archives of an event data set: fetched where they are missing, and checked by their MD5.

An archive is (name, address, MD5).
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from utils.errors import UserError
from utils.events.files import make_folder, progress_bar

_BLOCK = 1 << 22  # bytes


def fetch(archives: list[tuple[str, str, str]], folder: Path) -> None:
    """Download the archives that `folder` lacks or has damaged; each appears when it is complete and its MD5 fits.

    Raises:
        UserError: the host does not answer, sends something else, or the disk is full.
    """
    make_folder(folder)
    for name, url, md5 in archives:
        path = folder / name
        if path.is_file() and md5_of(path) == md5:
            continue
        partial = path.with_name(f".{name}.partial")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, partial.open("wb") as file:
                size = int(answer.headers.get("Content-Length") or 0) or None
                with progress_bar(size, f"download {name}", "B", unit_scale=True) as bar:
                    while block := answer.read(_BLOCK):
                        file.write(block)
                        bar.update(len(block))
        except (OSError, urllib.error.URLError) as error:
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"{url} cannot be downloaded to {folder} ({error}; {free / 2**30:.1f} GiB free); "
                f"try again, or put {name} there by hand"
            ) from error
        if (found := md5_of(partial)) != md5:
            raise UserError(
                f"{url} sent something else than {name} (MD5 {found}, expected {md5}); put it there by hand"
            )
        partial.replace(path)


def check_archives(archives: list[tuple[str, str, str]], folder: Path) -> None:
    """UserError that lists every archive that is missing from `folder` or has another MD5."""
    wrong = []
    for name, url, md5 in archives:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing: MD5 {md5}, {url}")
        elif (found := md5_of(path)) != md5:
            wrong.append(f"{name} ({path.stat().st_size:,} bytes) has MD5 {found}, expected {md5}: download it again")
    if wrong:
        raise UserError("\n    ".join([f"{folder}: {len(wrong)} file(s) missing or damaged:", *wrong]))


def md5_of(path: Path) -> str:
    """The MD5 of a file, in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    bar = progress_bar(path.stat().st_size, f"MD5 {path.name}", "B", unit_scale=True)
    with path.open("rb") as file, bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
