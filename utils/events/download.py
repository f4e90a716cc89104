"""The archives of an event data set: fetched where they are missing, and checked by their MD5.

An archive is (name, address, MD5).
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

from utils.errors import UserError
from utils.events.files import make_folder
from utils.files import replacing

_TIMEOUT = 60  # seconds without an answer


def fetch(archives: list[tuple[str, str, str]], folder: Path) -> None:
    """Download the archives that `folder` lacks or has damaged; each appears when it is complete and its MD5 fits.

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
