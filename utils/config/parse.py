"""From a YAML file and a command line to one valid `Config`: default < YAML (-c), or the settings inside a
checkpoint < command line.

In names, a hyphen equals an underscore. All problems of file and command line come in one `UserError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from utils.config.command_line import Option, help_text, split_command_line
from utils.config.field import shown
from utils.config.inside import entries_inside
from utils.config.rules import OLDER_NAMES_OF_AMP, Finding, ignored, impossible
from utils.config.settings import SETTINGS, Config
from utils.config.yaml_file import Entry, read_yaml
from utils.errors import UserError, did_you_mean, listed


class Source(IntEnum):
    """Where a value came from; the higher one wins."""

    DEFAULT = 0
    YAML = 1
    COMMAND_LINE = 2


@dataclass
class _Draft:
    """Values read so far, with the place of each, and the problems met on the way.

    prog: the program that will run with them, or None for a configuration that any program may run with
    """

    prog: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    settings_inside: str = ""

    def read(self, name: str, value: Any, place: str, source: Source) -> None:
        try:
            result = SETTINGS[name].read(value, text=source is Source.COMMAND_LINE)
            again = source is self.sources.get(name) and SETTINGS[name].rules.repeats
            self.values[name] = self.values.get(name, []) + result if again else result
        except ValueError as error:
            self.problems.append(f"{place}: {error}")
            self.unreadable.add(name)
        self.places[name] = place
        self.sources[name] = source

    def add_file(self, options: list[Option]) -> None:
        """Take the file that a command line names; two are refused, because one of them would have no effect."""
        paths = [option.value for option in options]
        if len(paths) == 1 and paths[0]:
            self.add_yaml(paths[0])
        elif paths:
            found = "names no file" if len(paths) == 1 else f"names {len(paths)} files ({listed(paths)})"
            remedy = "give one file, and what differs from it as options, or leave it out"
            self.problems.append(f"{options[-1].written}: {found}; {remedy}")
            self.unreadable.update(SETTINGS)

    def add_yaml(self, path: str) -> None:
        try:
            entries = read_yaml(path)
        except UserError as error:
            self.problems.append(str(error))
            self.unreadable.update(SETTINGS)
            return
        self.add_entries(entries)

    def add_entries(self, entries: list[Entry]) -> None:
        """Take the entries of one YAML file or mapping."""
        written: dict[str, Entry] = {}
        for entry in entries:
            name, place = entry.key.replace("-", "_"), f"{entry.place}: {entry.key}"
            earlier = written.setdefault(name, entry)
            if name not in SETTINGS:
                self.problems.append(f"{place}: unknown setting{_hint(name)}")
            elif name == "config":
                self.problems.append(f"{place}: a file cannot name another one; give it with -c")
            elif earlier is not entry and earlier.key == entry.key:
                self.problems.append(f"{place}: written twice, first at {earlier.place}; keep one")
                self.unreadable.add(name)
            elif earlier is not entry and earlier.value != entry.value:
                self.problems.append(
                    f"{place}: {shown(entry.value)} contradicts {earlier.key}: {shown(earlier.value)} "
                    f"at {earlier.place}, another spelling of the same setting; keep one"
                )
                self.unreadable.add(name)
            else:
                self.read(name, entry.value, place, Source.YAML)

    def add_inside(self, path: str, inside: Callable[[str], Mapping[Any, Any] | None]) -> None:
        """Take the settings inside a checkpoint, if it has any."""
        config = inside(path)
        if config is None:
            return
        entries, self.warnings = entries_inside(config, path)
        self.add_entries(entries)
        self.settings_inside = path

    def add_options(self, options: list[Option]) -> None:
        for option in options:
            self.read(option.name, option.value, option.written, Source.COMMAND_LINE)

    def build(self) -> Config:
        """The valid configuration.

        Raises:
            UserError: there are problems; it lists them all, one per line.
        """
        older = [self.sources[name] for name in OLDER_NAMES_OF_AMP if self.values.get(name)]
        if max(older, default=Source.DEFAULT) > self.sources.get("amp", Source.DEFAULT):
            self.values["amp"] = True
        cfg = Config(**self.values, explicit=frozenset(self.places))
        # A rule on a value that could not be read would complain about its default.
        found = (f for f in impossible(cfg) if not self.unreadable.intersection(f.names))
        self.problems += [self._line(f) for f in found if self._concerns(f)]
        if self.problems:
            count = len(self.problems)
            title = f"{count} problems in the settings:\n  " if count > 1 else ""
            raise UserError(title + "\n  ".join(self.problems))
        warnings = [*self.warnings, *(self._line(f) for f in ignored(cfg) if self._concerns(f))]
        return replace(cfg, warnings=tuple(warnings), inside=self.settings_inside)

    def _concerns(self, finding: Finding) -> bool:
        """Whether the program uses all the settings: one file serves two programs, each with settings of its own."""
        return self.prog is None or all(SETTINGS[name].serves(self.prog) for name in finding.names)

    def _line(self, finding: Finding) -> str:
        place = next((self.places[name] for name in finding.names if name in self.places), finding.names[0])
        return f"{place}: {finding.message}"


def parse_config(
    argv: list[str],
    *,
    prog: str,
    description: str,
    option_means: Mapping[str, str] | None = None,
    inside: Callable[[str], Mapping[Any, Any] | None] | None = None,
) -> Config:
    """The configuration a command line stands for, with the YAML file it names; `--help` prints and exits.

    An option that only another program uses is refused. The file may hold settings of all programs: those that `prog`
    has no use for are read and checked for their type, and combinations with them are left alone.

    `option_means` lets an option of the command line (not of the file) set another setting: a script that only
    evaluates takes `--batch-size` for `val_batch_size`.

    `inside` gives the settings inside the checkpoint that --resume names, or None. They are used where no -c is given,
    in the place of its file: without paths, device and workers (utils.config.inside).

    `Config.warnings` holds one line for each setting that was given and is ignored: log them.

    Raises:
        UserError: a setting is unknown, not valid or part of an impossible combination, an option is of another
            program, or the file cannot be read; the message lists every problem of the file and the command line.
        SystemExit: after `--help`.
    """
    means = option_means or {}
    options, problems, wants_help = split_command_line(argv, prog, means)
    if wants_help:
        print(help_text(prog, description, means))
        raise SystemExit(0)
    draft = _Draft(prog)
    draft.add_file([option for option in options if option.name == "config"])
    draft.problems += problems
    resume = [option.value for option in options if option.name == "resume"]
    if inside and resume and not problems and not any(option.name == "config" for option in options):
        draft.add_inside(str(resume[-1]), inside)
    draft.add_options(options)
    return draft.build()


def load_yaml(path: str | Path) -> Config:
    """The configuration of one YAML file alone.

    Raises:
        UserError: as `parse_config`.
    """
    draft = _Draft()
    draft.add_yaml(str(path))
    return replace(draft.build(), config=str(path))


def config_from(mapping: Mapping[str, Any], *, source: str = "settings") -> Config:
    """The configuration of a mapping from names to values, as `Config.as_dict` or a checkpoint has them.

    Raises:
        UserError: as `parse_config`; each line begins with `source`.
    """
    draft = _Draft()
    draft.add_entries([Entry(str(key), value, source) for key, value in mapping.items()])
    return draft.build()


def to_yaml(cfg: Config) -> str:
    """All settings as a YAML file by group, from which `load_yaml` reads an equal configuration."""
    lines = [f"# All settings of a run started with {cfg.config or 'the command line alone'}."]
    values = cfg.as_dict()
    for group, names in groupby(values, key=lambda name: SETTINGS[name].rules.group):
        lines += ["", f"# {group}"] + [f"{name}: {_scalar_or_flow(values[name])}" for name in names]
    return "\n".join(lines) + "\n"


def _scalar_or_flow(value: Any) -> str:
    # Strings in quotes: "0011" and "1e5" must not come back as numbers. Lists and mappings are written as JSON, which
    # is YAML and has each string in quotes.
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    style = '"' if isinstance(value, str) else None
    text: str = yaml.safe_dump(value, default_style=style, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _hint(name: str) -> str:
    if name.startswith("no_") and name.removeprefix("no_") in SETTINGS:
        return f"; write {name.removeprefix('no_')}: false"
    if f"no_{name}" in SETTINGS:
        return f"; the setting is no_{name}, with the opposite value"
    return did_you_mean(name, SETTINGS) or "; --help lists the settings"
