"""Command lines: options that do not exist, without a value, twice, with words between them, of any characters."""

from __future__ import annotations

import random
from pathlib import Path

import firing_num
import train
from tests.fuzzing.cases import Case, generator
from tests.fuzzing.programs import Program
from tests.fuzzing.values import ODD_TEXT, SMALL, as_word, write, yaml_of
from utils.config.settings import SETTINGS

_STRAY = (
    *("", "-", "--", "---", "-=", "--=", "--=1", "-x", "-c", "-b", "-vb", "-bx", "-j", "--lr", "--lr=", "--amp=true"),
    *("--no-lr", "--no-no-aug", "--LR", "--l", "-lr", "-data-dir", "-data_dir=", "-1", "-.5", "-inf", "-1e-5", "1"),
)


@generator("command lines")
def words(rng: random.Random, folder: Path) -> Case:
    """A valid command line with one word too much, too little, or another one."""
    argv = ["-c", write(folder, yaml_of(SMALL)), "--dry-run", "--epochs", "4"]
    word = rng.choice((_some_option(rng), rng.choice(_STRAY), rng.choice(_STRAY), as_word(rng.choice(ODD_TEXT))))
    if rng.random() < 0.5:
        argv.insert(rng.randint(0, len(argv)), word)
    else:
        argv[rng.randrange(len(argv))] = word
    program = rng.choice((train.main, train.main, firing_num.main))
    # Whatever is wrong is one of the words, a setting or file that one names, or what firing_num.py lacks beside them.
    option, _, value = word.partition("=")
    setting = {option.lstrip("-").replace("-", "_")} & SETTINGS.keys()
    file = {f"checkpoint {value}:"} if value else ()
    names = (*filter(None, {repr(word), option}), *setting, *file, "belongs to no option", "--", "-c: ", "resume")
    return Case(f"{program.__module__}.py {' '.join(map(repr, argv))}", Program(program, argv), names)


@generator("two files", share=0.1)
def two_files(rng: random.Random, folder: Path) -> Case:
    """More than one -c, or an empty one: one of the files would be left out without a word."""
    name = write(folder, yaml_of(SMALL))
    others = [rng.choice(("", "missing.yml", name, write(folder, "lr: x\n", "other.yml"))) for _ in range(2)]
    files = others[: rng.choice((1, 2))] if others[0] != name else [others[0], others[1] or name]
    argv = [word for file in files for word in (rng.choice(("-c", "--config")), file)]
    valid = None if files == [name] else False
    return Case(f"train.py {' '.join(map(repr, argv))}", Program(train.main, [*argv, "--dry-run"]),
                ("config", "-c", *filter(None, files)), valid)  # fmt: skip


def _some_option(rng: random.Random) -> str:
    flag = rng.choice(rng.choice(list(SETTINGS.values())).flags)
    at = rng.randrange(2, len(flag) + 1)
    changed = rng.choice((flag, flag[:at], flag[:at] + rng.choice("abcxyz-_=") + flag[at:], flag.upper(), flag[1:]))
    return changed + rng.choice(("", "", "=1", "=", "=x"))
