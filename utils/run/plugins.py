"""Plugins: files of the user's own that are imported before the model is built.

A plugin registers what it defines: a neuron (`module.neuron.register_neuron`), a model, whole or with an attention or a
block of its own (`timm.models.register_model`), a data set (`utils.data.register.register_dataset`). See
docs/extending.md.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.schema import Record, Text, checked

_logger = logging.getLogger("sdt")

COPIES = "plugins"  # folder of the copies, within that of the run


class Plugin(NamedTuple):
    """A plugin as it was when it was imported."""

    path: str
    sha256: str
    source: bytes


class _Recorded(Record):
    """A plugin in a checkpoint; its text is not needed."""

    path: Text
    sha256: Text


_imported: dict[Path, Plugin] = {}


def import_plugins(paths: Sequence[str] | None) -> None:
    """Import each file, in this order; one that was imported before is left as it is.

    Its folder is added at the end of `sys.path` and the module has the name of its file: so what it defines can be
    unpickled in the processes that load data, and it can import other files beside it.

    Raises:
        UserError: a file does not exist, is no Python, or has the name of another module.
        Exception: what the plugin itself raises, with a note that names the plugin.
    """
    for path in paths or ():
        file = Path(path).absolute()
        if file not in _imported:
            plugin = _read(path)
            _import(path, file)
            _imported[file] = plugin


def _read(path: str) -> Plugin:
    if not path.endswith(".py"):
        raise UserError(f"plugin: {path!r} is no Python file; give the path of a file that ends in .py")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"plugin: {path} cannot be read ({error.strerror}); paths begin at {Path.cwd()}, "
            f"and each run has copies in its folder {COPIES}/"
        ) from error
    return Plugin(path, hashlib.sha256(source).hexdigest(), source)


def _import(path: str, file: Path) -> None:
    name, folder = file.stem, str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
    if other := _other_module(name, file):
        raise UserError(f"plugin: {path} cannot be imported as {name!r}: {other}; rename the file")
    try:
        importlib.import_module(name)
    except UserError as error:
        raise UserError(f"plugin: {path}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"plugin: {path} cannot be compiled: {error.filename}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise UserError(f"plugin: {path} ended the program (sys.exit) while it was imported; take that out") from error
    except BaseException as error:
        error.add_note(f"This happened while the plugin {path} was imported.")
        raise


def _other_module(name: str, file: Path) -> str | None:
    """Why importing `name` would not import `file`, or None."""
    if "." in name:
        return "a module's name has no dot"
    try:
        found = importlib.util.find_spec(name)
    except ValueError:
        return "that is the program itself"
    origin = found.origin if found else None
    return None if origin and Path(origin).exists() and file.samefile(origin) else f"that is {origin}"


def record() -> list[dict[str, str]]:
    """The imported plugins for a checkpoint: path, SHA-256 and text of each."""
    return [{**p._asdict(), "source": p.source.decode(errors="replace")} for p in _imported.values()]


def keep_copies(folder: Path) -> None:
    """Write each imported plugin to `folder`/plugins, with their SHA-256 in the form that `sha256sum --check` reads.

    A copy of another content, from before the run was resumed, stays; the present one then has its SHA-256 in its name.
    """
    if not _imported:
        return
    copies = folder / COPIES
    copies.mkdir(exist_ok=True)
    for plugin in _imported.values():
        copy = copies / Path(plugin.path).name
        if copy.exists() and copy.read_bytes() != plugin.source:
            copy = copy.with_stem(f"{copy.stem}-{plugin.sha256[:8]}")
        copy.write_bytes(plugin.source)
    sums = [f"{hashlib.sha256(copy.read_bytes()).hexdigest()}  {copy.name}\n" for copy in sorted(copies.glob("*.py"))]
    (copies / "SHA256SUMS").write_text("".join(sums))


def say_what_changed(checkpoint: Mapping[Any, Any], path: str | Path, alone: bool = True) -> None:
    """Warn in one line if the plugins now are other ones than those that `checkpoint` (of `path`) was trained with.

    alone: this checkpoint is the only one, so that it needs every plugin that was imported.

    Raises:
        UserError: what the checkpoint holds of its plugins is of another form.
    """
    remedy = "the file is damaged or of another program: take another one"
    recorded = checked(list[_Recorded], checkpoint.get("plugins") or [], f"checkpoint {path}: plugins", remedy)
    then = {Path(plugin.path).name: plugin.sha256 for plugin in recorded}
    now = {Path(plugin.path).name: plugin.sha256 for plugin in _imported.values()}
    changes = [
        f"{name} was {_shown(then.get(name))} and is {_shown(now.get(name))}"
        for name in dict.fromkeys((*then, *now) if alone else then)
        if then.get(name) != now.get(name)
    ]
    if changes:
        _logger.warning(f"warning: other plugins than in {path}: {'; '.join(changes)}")


def _shown(sha256: str | None) -> str:
    return f"SHA-256 {sha256[:12]}" if sha256 else "not there"
