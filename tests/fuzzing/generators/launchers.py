"""The variables by which a launcher tells a process its place among the others."""

from __future__ import annotations

import random
from pathlib import Path

import train
from tests.fuzzing.cases import Case, generator
from tests.fuzzing.programs import Program
from tests.fuzzing.values import SMALL, write, yaml_of

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_VALUES = ("", " ", "x", "-1", "0", "1", "1.5", "2x", "1e3", "9" * 30, "é")


@generator("launchers", share=0.3)
def environment(rng: random.Random, folder: Path) -> Case:
    """Some of the variables, of which one is wrong; never a place among several that would be waited for."""
    given = {name: rng.choice(_VALUES) for name in rng.sample(_NAMES, rng.randint(1, 4))}
    if given.get("WORLD_SIZE", "").isdigit():
        given["WORLD_SIZE"] = "1"
    argv = ["-c", write(folder, yaml_of(SMALL)), "--dry-run"]
    what = "environment: " + ", ".join(f"{name}={value!r}" for name, value in given.items())
    wrong_place = "WORLD_SIZE" in given and given.get("RANK", "0") != "0"
    return Case(what, Program(train.main, argv, given), tuple(given), False if wrong_place else None)
