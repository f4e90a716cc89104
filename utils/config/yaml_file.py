"""A YAML file of settings, read with the line of each key."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils import ROOT
from utils.errors import UserError, nearest

_CONF = ROOT / "conf"


class Entry(NamedTuple):
    """One key as written, its value, and where it stands (file and line)."""

    key: str
    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2.

    YAML 1.1 reads `yes` and `off` as booleans, `3e-4` as a string, `0011` as an octal 9 and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own class attribute, none inherited


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL", "~nN"),
    ("null", r"", [""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(path: str) -> list[Entry]:
    """The keys of a YAML file in their order, duplicates included; none for an empty file.

    Raises:
        UserError: one line: no such file, not readable, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_suggestion(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    try:
        loader = _Loader(text)
        return _entries(loader, loader.get_single_node(), path)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_reason(error)}") from None


def read_value(text: str) -> Any:
    """The one value that `text` holds, read as in a file.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return _Loader(text).get_single_data()


def _entries(loader: _Loader, root: yaml.Node | None, path: str) -> list[Entry]:
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}: holds {found}, not settings; write one 'name: value' per line")
    entries = []
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "(list or mapping)"
        entries.append(Entry(name, loader.construct_object(value, deep=True), f"{path}:{key.start_mark.line + 1}"))
    return entries


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ": not YAML: " + " ".join(str(error).split())
    mark = error.problem_mark
    return f":{mark.line + 1}:{mark.column + 1}: not YAML: {error.problem}"


def _suggestion(path: str) -> str:
    """The nearest configuration file there is, or the folder that holds them."""
    known = {_from_here(file): file for file in sorted(_CONF.rglob("*.yml"))}
    by_ending = {f"{file.parent.name}/{file.name}": name for name, file in known.items()}
    by_name = {file.name: name for name, file in known.items()}
    tail = "/".join(Path(path).parts[-2:])
    ending = nearest(tail, by_ending) or nearest(tail + ".yml", by_ending)
    name = nearest(Path(path).name, by_name)
    found = by_ending[ending] if ending else by_name[name] if name else None
    if found:
        return f"; did you mean {found}?"
    folders = sorted({str(Path(name).parent) for name in known})
    return f"; configurations are in {', '.join(folders)}" if folders else ""


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
