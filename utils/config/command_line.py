"""The command line: its words split into settings, and the text of `--help`.

Not argparse: it stops at the first problem, and takes neither `--weight_decay` for `--weight-decay` nor a
number like -1e-5 for a value.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from utils.config.field import Setting
from utils.config.settings import SETTINGS
from utils.errors import did_you_mean

_HELP = ("-h", "--help")
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "", dict: "NAME=VALUE"}
_HELP_COLUMN = 30
_WITH_ONE_DASH = ("-data-dir", "-data_dir")  # so in the published command line


class Option(NamedTuple):
    """One option: the setting it names, its value, and the option as written."""

    name: str
    value: Any
    written: str


def split_command_line(argv: list[str], prog: str, means: Mapping[str, str]) -> tuple[list[Option], list[str], bool]:
    """The options of a command line, its problems (one line each), and whether it asks for help.

    Args:
        argv: the words.
        prog: the program they are for; an option of another one is a problem.
        means: settings whose options set another setting in this program.
    """
    meant = {option: SETTINGS[means.get(setting.name, setting.name)] for option, setting in _OPTIONS.items()}
    own = {option: setting for option, setting in meant.items() if setting.serves(prog)}
    options: list[Option] = []
    problems: list[str] = []
    words = list(reversed(argv))
    switch: Setting | None = None  # the last word, if it was a switch
    while words:
        word = words.pop()
        if not _is_option(word):
            hint = "settings are written as --name value"
            if switch:
                hint = f"a switch takes no value: write {' or '.join(switch.flags)}"
            problems.append(f"{word!r} belongs to no option; {hint}")
            switch = None
            continue
        written, values = _split(word)
        if written in _HELP:
            return options, problems, True
        setting = own.get(written)
        switch = setting if setting and setting.kind is bool else None
        wanted = _most_values(_OPTIONS.get(written)) - len(values)
        while words and wanted > 0 and not _is_option(words[-1]):
            values.append(words.pop())
            wanted -= 1
        if setting is None:
            problems.append(f"{written}: {_why_not(written, prog, own)}")
        elif setting.kind is bool:
            if values:
                problems.append(f"{written}={values[0]}: takes no value; write {' or '.join(setting.flags)}")
            else:
                options.append(Option(setting.name, written == setting.flags[0], written))
        elif not values:
            problems.append(f"{written}: needs a value: give {setting.valid}")
        else:
            options.append(Option(setting.name, _value(setting, values), written))
    return options, problems, False


def help_text(prog: str, description: str, means: Mapping[str, str]) -> str:
    """The settings that `prog` uses by group, with default, choices and short option; `means` as above."""
    width = min(100, max(80, shutil.get_terminal_size().columns))
    intro = (
        "A setting comes from the command line, else from the YAML file, else from its default. A switch "
        "is undone by the second form given. Hyphens and underscores are the same, here and in YAML."
    )
    lines = [f"usage: {prog} [-c CONFIG] [options]", "", description, "", *textwrap.wrap(intro, width)]
    own = (setting for setting in SETTINGS.values() if setting.serves(prog))
    for group, settings in groupby(own, key=lambda setting: setting.rules.group):
        lines += ["", f"{group}:"]
        for setting in settings:
            others = [SETTINGS[name] for name, meant in means.items() if meant == setting.name]
            lines += _help_entry(setting, others, width)
    return "\n".join(lines)


def _help_entry(setting: Setting, others: Sequence[Setting], width: int) -> list[str]:
    """The lines of one setting; `others` are those whose options mean it too."""
    rules = setting.rules
    metavar = "{" + ",".join(filter(None, rules.choices)) + "}" if rules.choices else _METAVARS[setting.kind]
    if len(metavar) > _HELP_COLUMN:  # a long list of choices reads better as text
        metavar = "NAME"
    options = [option for each in (setting, *others) for option in _options(each)]
    head = "  " + ", ".join(options) + (f" {metavar}" if metavar else "")
    if setting.takes_many:
        head += f" [{metavar} ...]" if len(rules.lengths) != 1 else f" {metavar}" * (rules.lengths[0] - 1)
    text = rules.help
    if metavar == "NAME":
        text += f"; {setting.valid}"
    if rules.no_effect:
        text += f"; no effect: {rules.no_effect}"
    if rules.unavailable:
        text += "; not available in this version"
    default = _shown(setting.default)
    facts = [setting.range] if setting.range else []
    if f"({default}:" not in text:  # else the help already says what the default stands for
        facts.append(f"default: {default}")
    text += f" ({'; '.join(facts)})" if facts else ""
    body = textwrap.wrap(text, width - _HELP_COLUMN)
    if len(head) + 2 > _HELP_COLUMN:
        body.insert(0, head)
    else:
        body[0] = head.ljust(_HELP_COLUMN) + body[0]
    return [body[0], *(" " * _HELP_COLUMN + line for line in body[1:])]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(f"{element:.4g}" for element in value)
    return "null" if value is None else str(value) or "empty"


def _is_option(word: str) -> bool:
    # -1e-5 is a value; also -inf, for which the message on the value says more than one on an option
    return len(word) > 1 and word.startswith("-") and not re.fullmatch(r"-(\.?\d.*|inf|nan)", word)


def _split(word: str) -> tuple[str, list[str]]:
    """The option in its canonical spelling, and the value attached to it, if any."""
    option, equals, value = word.partition("=")
    if option.startswith("--") or option in _WITH_ONE_DASH:
        option = "--" + option.lstrip("-").replace("_", "-")
    elif option not in _OPTIONS and _has_value_attached(option):
        return option[:2], [word[2:]]  # -j8
    return option, [value] if equals else []


def _has_value_attached(option: str) -> bool:
    """Whether it is a short option with its value, and not a long one that lacks a dash: -b8, but not -batch-size."""
    setting = _OPTIONS.get(option[:2])
    if setting is None:
        return False
    if setting.kind in (int, float):
        return re.match(r"[-+]?\.?\d", option[2:]) is not None
    long = "-" + option.replace("_", "-")
    return not any(known.startswith(long) for known in _OPTIONS)


def _most_values(setting: Setting | None) -> int:
    if setting is None:
        return 1  # most options take one
    if setting.kind is bool:
        return 0
    return 10**6 if setting.takes_many else 1


def _value(setting: Setting, values: list[str]) -> str | list[str] | None:
    if not setting.takes_many:
        return values[0]
    return None if setting.optional and values in (["null"], ["none"], ["None"]) else values


def _why_not(option: str, prog: str, own: Mapping[str, Setting]) -> str:
    """Why `prog`, which has the options `own`, does not take `option`."""
    if option in _OPTIONS:
        return (
            f"only {_OPTIONS[option].rules.only} makes use of it, {prog} does not; leave it out here (a YAML file for "
            "both may hold it)"
        )
    return "unknown option" + (did_you_mean(option, own) or "; --help lists the options")


def _options(setting: Setting) -> tuple[str, ...]:
    return (*setting.rules.aliases, *setting.flags)


_OPTIONS = {option: setting for setting in SETTINGS.values() for option in _options(setting)}
