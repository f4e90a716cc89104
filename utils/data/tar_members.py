"""The files in a tar: where the content of each lies, links included. Only the headers are read."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from timm.data.readers.img_extensions import get_img_extensions

from utils.errors import UserError

# What these names end in is data: it must not be left out because of how the tar stores it.
DATA = (*get_img_extensions(), ".cls", ".json")


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    folder: str  # name of the tar, less its ending, where a tar lies in a tar


def members(file: Path, *, nested: bool) -> Iterator[Member]:
    """The files in a tar, in its order; with `nested` also those in tars inside it. A link is the file it stands for.

    Raises:
        UserError: the tar is cut short, damaged or compressed; or an image or a label is a link to nothing in it.
    """
    try:
        with file.open("rb") as raw:
            yield from _walk(raw, file, 0, "", nested)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"data_dir: {file} is cut short, damaged or compressed ({error}); copy or make it again as a plain tar"
        ) from error
    except OSError as error:
        raise UserError(f"data_dir: {file} cannot be read ({error.strerror or error})") from error


def _walk(raw: IO[bytes], file: Path, base: int, folder: str, nested: bool) -> Iterator[Member]:
    links: _Links | None = None
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep about 1 KB for each
            path = PurePosixPath(entry.name)
            # Hidden files: macOS adds a ._name to each file.
            if path.name.startswith(".") or entry.isdir():
                continue
            stored: tarfile.TarInfo | None = entry
            if entry.islnk() or entry.issym():
                links = links or _Links(raw)
                stored = links.file_behind(entry, file)
            elif not entry.isfile():
                stored = None
                if path.suffix.lower() in DATA:
                    raise UserError(f"data_dir: {file}: {entry.name} is a device or a pipe; remove it from the tar")
            if stored is None:
                continue
            if stored.issparse():
                raise tarfile.TarError(f"{entry.name} is stored as a sparse file")
            if nested and path.suffix.lower() == ".tar":
                inner = tar.extractfile(stored)
                assert inner is not None  # it is a file
                below = str(PurePosixPath(folder, path.with_suffix("")))
                yield from _walk(inner, file, base + stored.offset_data, below, nested)
            else:
                yield Member(entry.name, base + stored.offset_data, stored.size, folder)
        # For tarfile, a broken header or a file that stops between two members is the end of the archive.
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.TarError(f"no end mark at byte {base + tar.offset}")


class _Links:
    """What the links of one tar stand for; made only for a tar that has some, since it keeps every member."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.members: dict[str, tarfile.TarInfo] = {}
        self.folders: set[str] = set()
        raw.seek(0)  # a tar begins where its file is read next
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                self.members[name] = member  # of two with one name, the last one is extracted
                self.folders.update(map(str, PurePosixPath(name).parents))
                if member.isdir():
                    self.folders.add(name)

    def _end(self, entry: tarfile.TarInfo) -> tuple[str, tarfile.TarInfo | None]:
        """The name at the end of a chain of links, and the member that has it."""
        name, found = entry.name, entry
        for _ in range(len(self.members) + 1):
            # A hard link names a member, a symbolic link a path from the folder that it lies in.
            folder = "" if found.islnk() else posixpath.dirname(name)
            name = posixpath.normpath(posixpath.join(folder, found.linkname))
            there = self.members.get(name)
            if there is None or not (there.islnk() or there.issym()) or there is found:
                return name, there
            found = there
        return name, None  # a circle

    def file_behind(self, entry: tarfile.TarInfo, file: Path) -> tarfile.TarInfo | None:
        """The file that a link in the tar `file` stands for; None for a link to nothing that is no data.

        Raises:
            UserError: an image or a label would be left out, or a folder of them.
        """
        name, found = self._end(entry)
        if found is not None and found.isfile():
            return found
        is_folder = name in self.folders - {"."}
        if is_folder or PurePosixPath(entry.name).suffix.lower() in DATA:
            what = "a folder" if is_folder else "no file in this tar"
            raise UserError(
                f"data_dir: {file}: {entry.name} is a link to {entry.linkname!r}, which is {what}; make the tar again "
                "with the files themselves (tar --dereference)"
            )
        return None
