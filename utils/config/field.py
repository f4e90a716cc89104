"""One setting: its type, valid values and explanation, and how a value from a YAML or a command line is read.

Free of torch and timm, so that `--help` and a wrong setting are answered at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from operator import ge, gt, le, lt
from typing import Any

import yaml

from utils.config.yaml_file import read_value
from utils.errors import did_you_mean, shortened

_KEY = "setting"
_BOUNDS = {"low": (">=", ge), "above": (">", gt), "high": ("<=", le), "below": ("<", lt)}
_COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "names with values, as {tau: 3.0}; on a command line also tau=3.0",
}


@dataclass(frozen=True)
class Rules:
    """What `setting()` states about one field of the configuration."""

    help: str
    group: str
    choices: tuple[str, ...] = ()
    low: float | None = None  # inclusive bounds; every number has an upper one
    high: float | None = None
    above: float | None = None  # exclusive bounds
    below: float | None = None
    lengths: tuple[int, ...] = ()  # of a list; () allows any length from one up
    pattern: tuple[str, str] | None = None  # regular expression, and the same in words
    aliases: tuple[str, ...] = ()  # short options
    synonyms: Mapping[str, str] = field(default_factory=dict)  # older words for some of the choices
    repeats: bool = False  # a list that may also be written as one value, or as one option per value
    no_effect: str = ""  # reason; a value that differs from the default warns
    unavailable: str = ""  # reason; a value that differs from the default is an error
    only: str = ""  # the one program that uses it; empty for all


def setting(default: Any, help: str, *, group: str, compare: bool = True, **rules: Any) -> Any:
    """Declare one field of a configuration dataclass; `rules` are the fields of `Rules`."""
    metadata = {_KEY: Rules(help=help, group=group, **rules)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, compare=compare)
    return field(default=default, metadata=metadata, compare=compare)


@dataclass(frozen=True)
class Setting:
    """One setting with its type; `read` turns a given value into a valid one."""

    name: str
    kind: type  # bool, int, float, str or dict; of the elements when is_list
    optional: bool
    is_list: bool
    default: Any
    rules: Rules

    @property
    def flags(self) -> tuple[str, ...]:
        """Long options: the one that sets it; for a switch also the one that undoes it."""
        flag = "--" + self.name.replace("_", "-")
        if self.kind is not bool:
            return (flag,)
        undo = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")
        return (flag, undo)

    def serves(self, program: str) -> bool:
        """Whether `program` uses this setting."""
        return self.rules.only in ("", program)

    @property
    def takes_many(self) -> bool:
        """Whether a command line may give it several words."""
        return self.is_list or self.kind is dict

    @property
    def valid(self) -> str:
        """The valid values in words, to complete 'give ...'."""
        rules = self.rules
        if self.kind is bool:
            words = "true or false"
        elif rules.choices:
            words = "one of " + ", ".join(choice or '""' for choice in rules.choices)
        elif rules.pattern:
            words = rules.pattern[1]
        else:
            words = f"{_WORDS[self.kind]} {self.range}".rstrip()
        if self.is_list:
            counts = " or ".join(_COUNT_WORDS.get(n, str(n)) for n in rules.lengths)
            words = f"a list of {counts + ' values' if counts else 'values'}, each {words}"
        return words + (" (or null)" if self.optional else "")

    @property
    def range(self) -> str:
        """The bounds of a number, as '>= 1 and <= 100'; empty where there are none."""
        return " and ".join(
            f"{sign} {bound if isinstance(bound, int) else f'{bound:g}'}" for sign, _, bound in self._bounds()
        )

    def read(self, value: Any, *, text: bool = False) -> Any:
        """The valid value that `value` stands for; `text` says that it comes from a command line.

        Raises:
            ValueError: the value is not valid; the message says which values are.
        """
        if self.optional and (value is None or (text and value in ("null", "none", "None"))):
            return None
        if not self.is_list:
            return self._read_one(value, text)
        if self.rules.repeats and isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)) or not value:
            raise self._invalid(value)
        if self.rules.lengths and len(value) not in self.rules.lengths:
            raise self._invalid(value)
        return [self._read_one(element, text) for element in value]

    def _read_one(self, value: Any, text: bool) -> Any:
        try:
            result = _READERS[self.kind](value, text)
        except (TypeError, ValueError, OverflowError, yaml.YAMLError):
            raise self._invalid(value) from None
        if isinstance(result, str):
            result = self.rules.synonyms.get(result, result)
        if not self._allows(result):
            raise self._invalid(value)
        return result

    def _allows(self, value: Any) -> bool:
        if self.rules.choices and value not in self.rules.choices:
            return False
        if self.rules.pattern and not re.fullmatch(self.rules.pattern[0], value, re.ASCII):
            return False
        if isinstance(value, str) and _why_no_name(value):
            return False
        return all(holds(value, bound) for _, holds, bound in self._bounds())

    def _bounds(self) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
        stated = ((sign, holds, getattr(self.rules, name)) for name, (sign, holds) in _BOUNDS.items())
        return [(sign, holds, bound) for sign, holds, bound in stated if bound is not None]

    def _invalid(self, value: Any) -> ValueError:
        hint = did_you_mean(str(value), self.rules.choices) if self.rules.choices else ""
        if self.kind is str and isinstance(value, (int, float)):
            hint = f'; put it in quotes: "{shown(value)}"'
        elif self.kind is str and isinstance(value, str) and (reason := _why_no_name(value)):
            return ValueError(f"{shown(value)} is not valid: {reason}")
        return ValueError(f"{shown(value)} is not valid: give {self.valid}{hint}")


def _why_no_name(text: str) -> str:
    """Why `text` can be neither a word nor the path of a file, or ''."""
    if any(unicodedata.category(character) == "Cc" for character in text):
        return "it has control characters; give text without them"
    encoding = sys.getfilesystemencoding()
    try:
        longest = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:
        remedy = "" if encoding == "utf-8" else " (start with LC_ALL=C.UTF-8, where the locale has UTF-8)"
        return f"not all of its characters exist in {encoding}, in which files are named; use others{remedy}"
    if longest > 255 or len(text) > 4000:
        return "no file has so long a name; give a shorter one"
    return ""


def shown(value: Any) -> str:
    """A value as it is written in YAML, for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(value)


def settings_of(config: type) -> dict[str, Setting]:
    """The settings a configuration dataclass declares, in their order."""
    hints = typing.get_type_hints(config)
    return {f.name: _setting_of(f, hints[f.name]) for f in fields(config) if _KEY in f.metadata}


def _setting_of(declared: Field[Any], hint: Any) -> Setting:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (option for option in options if option is not type(None))
    is_list = typing.get_origin(kind) is list
    assert declared.default is not MISSING or declared.default_factory is not MISSING
    return Setting(
        name=declared.name,
        kind=typing.get_args(kind)[0] if is_list else typing.get_origin(kind) or kind,
        optional=type(None) in options,
        is_list=is_list,
        default=declared.default if declared.default_factory is MISSING else declared.default_factory(),
        rules=declared.metadata[_KEY],
    )


def _read_bool(value: Any, text: bool) -> bool:
    # Strict: bool("false") is True, and a 0 or 1 here is usually meant for another setting.
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_int(value: Any, text: bool) -> int:
    if text and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+", value):  # int() also takes 1_000 and ' 1 '
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _read_float(value: Any, text: bool) -> float:
    # A string also from a YAML: a YAML 1.1 reader leaves 3e-4, which has no dot, as a string.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if isinstance(value, str) and not re.fullmatch(r"[-+.0-9eE]+", value):  # float() also takes 1_000, ' 1 ' and ١
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_str(value: Any, text: bool) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # pooling_stat: 1111, experiment: 7
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_mapping(value: Any, text: bool) -> dict[str, Any]:
    if text and len(value) == 1 and value[0].startswith("{"):
        value = read_value(value[0])
    elif text:
        pairs = [word.partition("=") for word in value]
        if not all(name and equals for name, equals, _ in pairs):
            raise ValueError
        value = {name: read_value(given) for name, _, given in pairs}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise TypeError
    json.dumps(value, allow_nan=False)  # plain data only: it goes into checkpoints
    return value


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str, dict: _read_mapping}
