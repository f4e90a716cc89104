"""A YAML file of settings, read with the line of each key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from utils import ROOT
from utils.errors import UserError, nearest, shortened

_CONF = ROOT / "conf"
# Far more than any file of settings has.
_MOST_CHARACTERS, _MOST_VALUES, _MOST_LEVELS = 1_000_000, 10_000, 20


class Entry(NamedTuple):
    """One key as written, its value, and where it stands (file and line)."""

    key: str
    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2: null, true and false, numbers, text, lists and mappings; nothing else has a meaning.

    YAML 1.1 reads `yes` and `off` as booleans, `3e-4` as a string, `0011` as an octal 9 and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own class attribute, none inherited

    # PyYAML reads nested values by recursion, and takes long to see that thousands of brackets are open. So both ways
    # of going one level deeper are watched where the text is split into tokens.

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        self._refuse_depth(self.flow_level)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._refuse_depth(len(self.indents))
        return super().add_indent(column)

    def _refuse_depth(self, depth: int) -> None:
        if depth >= _MOST_LEVELS:
            raise ScannerError(None, None, f"more than {_MOST_LEVELS} levels", self.get_mark())

    def get_single_node(self) -> yaml.Node | None:
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            self._refuse_size(root, {})
        return root

    def _refuse_size(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """The number of values in `node` with every alias written out; a few lines of aliases can stand for billions.

        Args:
            sizes: the values in each node by its id; 0 for one that is being counted.
        """
        if id(node) in sizes:
            if sizes[id(node)] == 0:
                raise ConstructorError(None, None, "a value that contains itself", node.start_mark)
            return sizes[id(node)]
        sizes[id(node)], total = 0, 1
        if isinstance(node, yaml.CollectionNode):
            for child in node.value:
                total += sum(
                    self._refuse_size(part, sizes) for part in (child if isinstance(child, tuple) else [child])
                )
        if total > _MOST_VALUES:
            raise ConstructorError(None, None, f"more than {_MOST_VALUES} values", node.start_mark)
        sizes[id(node)] = total
        return total

    def plain(self, node: yaml.Node) -> Any:
        """The value of a node."""
        kind = node.tag.removeprefix(_TAG)
        if kind == "seq" and isinstance(node, yaml.SequenceNode):
            return [self.plain(child) for child in node.value]
        if kind == "map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if kind not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            raise ConstructorError(None, None, f"{kind} is no kind of value that a setting has", node.start_mark)
        if not re.fullmatch(_SCALARS[kind][0], node.value):
            raise ConstructorError(None, None, f"{shortened(node.value)} is no {kind} value", node.start_mark)
        try:
            return _SCALARS[kind][1](node.value)
        except ValueError:  # Python reads no more than 4,300 digits
            raise ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark) from None

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a list or mapping as a name", key_node.start_mark)
            key = self.plain(key_node)
            if key in found:
                raise ConstructorError(None, None, f"{shortened(key_node.value)} is there twice", key_node.start_mark)
            found[key] = self.plain(value)
        return found


# Tag -> which texts are such a value, and its value. The first four are recognised by their form.
_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", int),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", float),
    "str": (r"(?s:.*)", str),
}
for _kind, _first in (("null", ["~", "n", "N", ""]), ("bool", [*"tTfF"]), ("int", [*"-+0123456789"]),
                      ("float", [*"-+.0123456789"])):  # fmt: skip
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_SCALARS[_kind][0]})\Z"), _first)


def read_yaml(path: str) -> list[Entry]:
    """The keys of a YAML file in their order, duplicates included; none for an empty file.

    Raises:
        UserError: one line: no such file, not readable, no YAML of plain values, or not a mapping.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_suggestion(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except ValueError:
        raise UserError(f"{path!r}: no file can have this name; give a YAML file") from None
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{path}: more than {_MOST_CHARACTERS:,} characters; give a YAML file of settings")
    try:
        loader = _Loader(text)
        return _entries(loader, loader.get_single_node(), path)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_reason(error)}") from None
    except ValueError as error:  # PyYAML looks up the characters of escapes like \\U00110000 unchecked
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_value(text: str) -> Any:
    """The one value that `text` holds, read as in a file.

    Raises:
        yaml.YAMLError: it is not YAML, or of a kind that no setting takes.
    """
    loader = _Loader(text)
    node = loader.get_single_node()
    return None if node is None else loader.plain(node)


def _entries(loader: _Loader, root: yaml.Node | None, path: str) -> list[Entry]:
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}: holds {found}, not settings; write one 'name: value' per line")
    entries = []
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "(list or mapping)"
        entries.append(Entry(name, loader.plain(value), f"{path}:{key.start_mark.line + 1}"))
    return entries


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ": cannot be read: " + " ".join(str(error).split())
    mark = error.problem_mark
    return f":{mark.line + 1}:{mark.column + 1}: cannot be read: {error.problem}"


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
