"""Values that no program expects, and the smallest run they are given to."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

# The smallest run of train.py, which is built and timed in a fraction of a second.
SMALL: dict[str, Any] = {
    **{"dataset": "digits", "num_classes": 10, "in_channels": 1, "img_size": 8, "pooling_stat": "0011"},
    **{"layer": 1, "dim": 16, "num_heads": 2, "time_steps": 2, "batch_size": 240, "val_batch_size": 360},
    **{"hflip": 0.0, "workers": 0, "device": "cpu", "kernels": "plain", "epochs": 5, "warmup_epochs": 0},
}

# Far outside of everything that a setting may mean.
HUGE = (10**15, 10**16 + 1, 2**64, 10**30, -(10**15), -(2**63), 10**4999, 1e15, 1e16, 1e30, 1e300, -1e15, -1e300)
NOT_FINITE = (math.nan, math.inf, -math.inf)
NO_NUMBER = ("", "fast", "1x", "0x", "1,5", "--", "١x", "1" * 5000 + "x", True, None, [], {}, [[1]], {"a": 1})
NO_TEXT = (True, 1.5, [], {}, ["a"], {"a": 1})
ODD_TEXT = (
    *("", " ", "\n", "\t", "'", '"', "\\", "%s", "{}", "{0}", "*", "?", ".", "..", "../..", "/", "//", "~", "-", "--"),
    *("a\0b", "\0", "\udcff", "\ud800", "é", "日本", "\u202e", "a" * 300, "a/" * 3000, "null", "true", "0011", "1e5"),
)
SMALL_NUMBERS = (0, 1, 2, 3, 5, 7, 8, 10, 16, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 1e-9, 1e-300, 5e-324, -1, -0.5, -1e-9)


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value of any kind that YAML and JSON can hold."""
    pool = rng.choice((HUGE, NOT_FINITE, NO_NUMBER, NO_TEXT, ODD_TEXT, SMALL_NUMBERS))
    if depth < 2 and rng.random() < 0.1:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice(pool)


def as_json(value: Any) -> str:
    """A value as JSON; other than `json.dumps`, also a whole number of 5,000 digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _digits(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {as_json(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def as_yaml(value: Any) -> str:
    """A value as YAML on one line: JSON is YAML, but for the words of what is not finite."""
    text = as_json(value)
    return re.sub(r"-?\bInfinity\b", lambda m: m[0].replace("Infinity", ".inf"), re.sub(r"\bNaN\b", ".nan", text))


def as_word(value: Any) -> str:
    """A value as a word of a command line, which can hold no NUL and, of lone surrogates, only bytes in disguise."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        text = _digits(value)
    else:
        text = {True: "true", False: "false", None: "null"}.get(value, str(value)) if not _many(value) else str(value)
    return text.replace("\0", "").replace("\ud800", "\udc80")


def shortened(value: Any, most: int = 60) -> str:
    text = as_yaml(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def write(folder: Path, text: str | bytes, name: str = "case.yml") -> str:
    """Write a file of the case and return its name."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return name


def yaml_of(values: dict[str, Any]) -> str:
    return "".join(f"{name}: {as_yaml(value)}\n" for name, value in values.items())


def _many(value: Any) -> bool:
    return isinstance(value, (list, dict))


def _digits(value: int) -> str:
    # Python refuses to print numbers of more than 4,300 digits.
    if abs(value) < 10**4000:
        return str(value)
    sign, value = ("-", -value) if value < 0 else ("", value)
    high, low = divmod(value, 10**3000)
    return f"{sign}{high}{low:03000}" if high < 10**4000 else f"{sign}{'9' * 8000}"
