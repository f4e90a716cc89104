"""Settings: one or two of them with values of any kind, in a file or on the command line; and schedules."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

import train
from tests.fuzzing.cases import Case, generator
from tests.fuzzing.programs import Program
from tests.fuzzing.values import (
    HUGE,
    NO_NUMBER,
    NO_TEXT,
    NOT_FINITE,
    ODD_TEXT,
    SMALL,
    SMALL_NUMBERS,
    anything,
    as_word,
    shortened,
    write,
    yaml_of,
)
from utils.config.field import Setting
from utils.config.settings import SETTINGS, TRAIN

# Given to every case, or of another program's only (their types are checked all the same), or with a file behind them.
_LEFT_OUT = ("config", "dry_run")
# The values that are right for settings whose names a generator cannot guess.
_WORDS = ("adamw", "sgd", "lamb", "nope", "sdt", "sdt_8_512", "lif", "plif", "atan", "digits", "imagenet", "rand-m9-n1")


@generator("settings", share=3.0)
def one_setting(rng: random.Random, folder: Path) -> Case:
    """One setting, given a value of which the generator mostly knows that it is not valid."""
    setting = rng.choice([s for s in SETTINGS.values() if s.name not in _LEFT_OUT])
    value, valid = _value(rng, setting)
    return _case(rng, folder, {setting.name: value}, valid)


@generator("combinations")
def several_settings(rng: random.Random, folder: Path) -> Case:
    """Some settings with small values: the rules on combinations, and everything that is built from them."""
    names = rng.sample([s.name for s in SETTINGS.values() if s.name not in _LEFT_OUT and s.serves(TRAIN)], 3)
    values = {name: _plausible(rng, SETTINGS[name]) for name in names}
    return _case(rng, folder, values, None)


def _case(rng: random.Random, folder: Path, values: dict[str, Any], valid: bool | None) -> Case:
    on_command_line = rng.random() < 0.4 and all(SETTINGS[name].serves(TRAIN) for name in values)
    rest = {name: value for name, value in SMALL.items() if name not in values}
    argv = ["-c", write(folder, yaml_of(rest if on_command_line else rest | values)), "--dry-run"]
    if on_command_line:
        for name, value in values.items():
            argv += _options(SETTINGS[name], value)
            if SETTINGS[name].kind is str and not any("\udc80" <= char <= "\udcff" for char in "".join(argv)):
                valid = None  # there each word is a text
    what = ("on the command line: " if on_command_line else "in a file: ") + ", ".join(
        f"{name}: {shortened(value)}" for name, value in values.items()
    )
    # What is said about a file that does not exist names the file.
    texts = [v for name, v in values.items() if isinstance(v, (str, dict, list)) or SETTINGS[name].kind is str]
    files = [word for value in texts if (word := as_word(value))]
    return Case(what, Program(train.main, argv), names=(*values, "case.yml:", *files), valid=valid)


def _options(setting: Setting, value: Any) -> list[str]:
    flag = setting.flags[0]
    if setting.kind is bool and isinstance(value, bool):
        return [setting.flags[0 if value else 1]]
    if setting.takes_many and isinstance(value, list) and value:
        return [flag, *map(as_word, value)]
    return [f"{flag}={as_word(value)}"]


def _value(rng: random.Random, setting: Setting) -> tuple[Any, bool | None]:
    """A value for a setting, and whether it is valid as far as its type tells."""
    if rng.random() < 0.2:
        return _plausible(rng, setting), None
    if setting.is_list:
        if rng.random() < 0.5:
            pool = (None, *NO_TEXT) if setting.kind is str else (None, *NO_NUMBER, *HUGE)
            value = rng.choice([v for v in pool if not (v is None and setting.optional)])
            return value, None if isinstance(value, list) and value and setting.kind is str else False
        value, valid = _one(rng, setting)
        return [value] * rng.choice(setting.rules.lengths or (1, 2, 3)), valid
    return _one(rng, setting)


def _one(rng: random.Random, setting: Setting) -> tuple[Any, bool | None]:
    if setting.kind in (int, float):
        pool = rng.choice((HUGE, HUGE, NOT_FINITE, NO_NUMBER))
        value = rng.choice(pool)
        may_be_null = value is None and setting.optional
        # A whole number up to 2**63 seeds a generator.
        is_seed = setting.name == "seed" and isinstance(value, (int, float)) and 0 <= value < 2**63
        return value, None if may_be_null or is_seed else False
    if setting.kind is bool:
        value = rng.choice([*(v for v in NO_NUMBER if v is not True), 0, 1, "true", "yes", *HUGE])
        return value, None if value is None and setting.optional else False
    if setting.kind is dict:
        value = rng.choice((*NO_TEXT, "a", 3, {"a": math.nan}, {"": {}}))
        return value, None if isinstance(value, dict) else False
    if rng.random() < 0.4:
        return rng.choice([v for v in NO_TEXT if not isinstance(v, list) or not setting.rules.repeats]), False
    value = rng.choice(ODD_TEXT)
    return value, False if "\0" in value or "\ud800" in value or "\udcff" in value else None


def _plausible(rng: random.Random, setting: Setting) -> Any:
    """A value of the right type, often a valid one."""
    if setting.optional and rng.random() < 0.1:
        return None
    if setting.is_list:
        return [_plausible_one(rng, setting) for _ in range(rng.choice(setting.rules.lengths or (1, 2, 3)))]
    return _plausible_one(rng, setting)


def _plausible_one(rng: random.Random, setting: Setting) -> Any:
    if setting.rules.choices:
        return rng.choice(setting.rules.choices)
    if setting.kind is bool:
        return rng.random() < 0.5 and setting.name != "compile"  # which takes a minute
    if setting.kind is int:
        most = 2 if setting.name == "workers" else 100  # each takes seconds to start
        return rng.choice([v for v in SMALL_NUMBERS if isinstance(v, int) and v <= most])
    if setting.kind is float:
        return rng.choice(SMALL_NUMBERS)
    if setting.kind is dict:
        return {rng.choice(("tau", "v_threshold", "v_reset", "nope")): anything(rng)}
    return rng.choice((*_WORDS, *ODD_TEXT))


_SCHEDULE = [
    name for name, s in SETTINGS.items() if s.rules.group == "Learning rate schedule" and name != "start_epoch"
]


@generator("schedules")
def schedule(rng: random.Random, folder: Path) -> Case:
    """A schedule of random numbers, walked as a run would walk it: every rate a number from 0 up."""
    values: dict[str, Any] = {
        "sched": rng.choice(SETTINGS["sched"].rules.choices),
        "epochs": rng.choice((1, 2, 5, 30, 200)),
        "lr": 10 ** rng.uniform(-8, 1),
    }
    for name in rng.sample(_SCHEDULE, rng.randint(1, 6)):
        setting = SETTINGS[name]
        if name == "lr_noise":
            values[name] = sorted(round(rng.random(), 2) for _ in range(rng.choice((1, 2))))
        elif setting.kind is int:
            values[name] = rng.choice((0, 1, 2, 3, 10, 100))
        elif setting.kind is float:
            values[name] = rng.choice((0.0, 10 ** rng.uniform(-12, 6), rng.uniform(0, 2)))
    values["warmup_epochs"] = min(values.get("warmup_epochs", 0), values["epochs"] - 1)
    names = (*_SCHEDULE, "epochs", "lr")
    what = "a schedule: " + ", ".join(f"{name}: {shortened(value)}" for name, value in values.items())
    return Case(what, functools.partial(_walk, values), names=names)


def _walk(values: dict[str, Any]) -> None:
    import torch

    from utils.config.parse import config_from
    from utils.train.optim import learning_rate, make_optimizer, make_schedule, set_learning_rate

    cfg = config_from(values)
    optimizer = make_optimizer(cfg, torch.nn.Linear(2, 2))
    made, epochs = make_schedule(cfg, optimizer)
    for epoch in range(epochs):
        set_learning_rate(made, epoch + 1, 50.0)
        rate = learning_rate(optimizer)
        assert math.isfinite(rate), f"the rate of epoch {epoch + 1} is {rate}"
        assert rate >= 0, f"the rate of epoch {epoch + 1} is {rate}"
