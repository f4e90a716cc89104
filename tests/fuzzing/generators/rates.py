"""Files of firing rates for `firing_num.py --from-rates`: the published one, changed."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

import firing_num
from tests.fuzzing.cases import Case, generator
from tests.fuzzing.programs import ROOT, Program
from tests.fuzzing.values import HUGE, NO_NUMBER, NOT_FINITE, ODD_TEXT, anything, as_json, shortened, write

_TABLE = ROOT / "data" / "paper" / "table_s1_8_512.json"


@generator("rates", share=1.5)
def one_value(rng: random.Random, folder: Path) -> Case:
    """One value of the file replaced, removed, or there twice."""
    content = json.loads(_TABLE.read_text())
    path = _some_path(rng, content)
    where = "/".join(map(str, path)) or "the whole file"
    parent: Any = functools.reduce(lambda inner, key: inner[key], path[:-1], content)
    valid: bool | None = None
    kind = rng.choice(("value", "value", "value", "removed", "twice", "size"))
    if kind == "size":
        name = rng.choice(list(content["model"]))
        value = rng.choice((*HUGE, *NOT_FINITE, *NO_NUMBER, 0.5, 1.5, -1))
        content["model"][name] = value
        what, valid = (
            f"model/{name}: {shortened(value)}",
            None if name == "mlp_ratio" and value in (0.5, 1.5) else False,
        )
    elif not path or kind == "value":
        value = anything(rng)
        what = f"{where}: {shortened(value)}"
        if path:
            parent[path[-1]] = value
        else:
            content = value
    elif kind == "removed":
        del parent[path[-1]]
        what = f"{where} removed"
    else:
        entry = copy.deepcopy(rng.choice(content["tensors"]))
        content["tensors"].insert(rng.randrange(len(content["tensors"])), entry)
        what, valid = f"{entry['name']} twice", False
    return _given(folder, as_json(content), what, valid)


@generator("rates bytes", share=0.5)
def changed_bytes(rng: random.Random, folder: Path) -> Case:
    """The file with bytes changed, cut off, or nested without end."""
    content = bytearray(_TABLE.read_bytes())
    kind = rng.choice(("flip", "cut", "noise", "deep", "digits", "text", "key twice"))
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "noise":
        content = bytearray(rng.randbytes(rng.choice((0, 1, 20, 3000))))
    elif kind == "deep":
        content = bytearray(b'{"model": ' + rng.choice((b"[", b'{"a": ')) * rng.choice((500, 5000, 500_000)))
    elif kind == "digits":
        content = content.replace(b"512", b"5" * 5000, 1)
    elif kind == "text":
        content = bytearray(json.dumps(rng.choice(ODD_TEXT)).encode())
    else:
        content = content.replace(b'"model": {', b'"model": {}, "model": {', 1)
    return _given(folder, bytes(content), f"bytes of the file changed: {kind}", None)


def _given(folder: Path, content: str | bytes, what: str, valid: bool | None) -> Case:
    argv = ["--from-rates", write(folder, content, "rates.json"), "--output", "out"]
    return Case(f"rates, {what}", Program(firing_num.main, argv), ("rates.json",), valid)


def _some_path(rng: random.Random, content: Any) -> list[Any]:
    """The keys that lead to a value at any depth."""
    path: list[Any] = []
    while isinstance(content, (dict, list)) and content and rng.random() < 0.8:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        path.append(key)
        content = content[key]
    return path
