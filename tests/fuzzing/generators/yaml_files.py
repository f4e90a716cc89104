"""YAML files: values with tags, nesting, anchors, bytes that are no text, and lines of a real file changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import train
from tests.fuzzing.cases import Case, generator
from tests.fuzzing.programs import ROOT, Program
from tests.fuzzing.values import SMALL, write, yaml_of

_CONF = "conf/digits/1_64_15E_t4.yml"
_TAGS = (
    *("int", "float", "bool", "null", "str", "timestamp", "binary", "set", "omap", "pairs", "map", "seq"),
    *("python/none", "merge", "value", "nope"),
)
_TAGGED = ("abc", "", "''", "[]", "{}", "[1]", "{a: 1}", "2020-99-99", "1:30", "0x1F", "0b2", "!!int", "~", "'\\x00'")


def _tag(rng: random.Random) -> str:
    return f"{rng.choice(list(SMALL))}: !!{rng.choice(_TAGS)} {rng.choice(_TAGGED)}\n"


def _digits(rng: random.Random) -> str:
    name = rng.choice(("epochs", "lr", "dim", "seed", "pooling_stat", "experiment", "mean"))
    digits = rng.choice("123456789") * rng.choice((4300, 4301, 5000, 100_000))
    return f"{name}: {rng.choice(('', '-', '[', '0.', '1e', '.'))}{digits}\n"


def _deep(rng: random.Random) -> str:
    depth = rng.choice((50, 500, 5000, 50_000))
    left, right = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("{", "}")))
    return f"mean: {left * depth}1{right * depth}\n"


def _anchors(rng: random.Random) -> str:
    levels = rng.choice((3, 9, 30))
    width = rng.choice((2, 9, 50))
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    key = rng.choice(("mean", "neuron_args", "lr", "plugin"))
    return "\n".join([*lines, f"{key}: *a{levels - 1}", rng.choice(("", "<<: *a0", "lr: *nope", "lr: &x *x"))]) + "\n"


_SYNTAX = (
    *(
        "[1\n",
        "{\n",
        "a: b: c\n",
        "\tlr: 1\n",
        "lr: 1\n lr: 2\n",
        "%YAML 9.9\n---\n",
        "---\n---\n",
        "...\n",
        "? \n",
        "-\n",
    ),
    *("- lr\n", "lr\n", "&a\n", "*a\n", "!!python/object:os.system {}\n", "lr: |\n", "'lr: 1\n", "lr: '\n", "lr: @\n"),
    *(
        '"\\ud800": 1\n',
        'experiment: "\\0"\n',
        'data_dir: "\\ud800"\n',
        'data_dir: "\\U00110000"\n',
        "lr: `\n",
        "lr: >\n",
    ),
    *(
        "lr: \x00\n",
        "lr: \x01\n",
        "\ufeff",
        "\x85",
        "\u2028lr: 1",
        ":\n",
        "#\n",
        "1: 1\n",
        "null: 1\n",
        "[]: 1\n",
        "~\n",
    ),
    *(
        "<<: 1\n",
        "<<: {lr: x}\n",
        "=: 1\n",
        "lr: =\n",
        "lr: <<\n",
        "lr: .\n",
        "lr: -\n",
        "lr: +\n",
        "lr: 1_000\n",
        "{}: 1\n",
    ),
)


def _syntax(rng: random.Random) -> str:
    return rng.choice(_SYNTAX)


_PARTS: tuple[Callable[[random.Random], str], ...] = (_tag, _tag, _digits, _deep, _anchors, _syntax, _syntax)


@generator("yaml", share=1.5)
def yaml_file(rng: random.Random, folder: Path) -> Case:
    """A small valid file with something odd in front, behind, or in the place of a key."""
    odd = rng.choice(_PARTS)(rng)
    rest = {name: value for name, value in SMALL.items() if not odd.startswith(f"{name}:")}
    text = rng.choice((odd + yaml_of(rest), yaml_of(rest) + odd, odd))
    return _given(folder, text, f"a file with {odd[:60]!r} ({len(odd)} characters)")


@generator("yaml bytes")
def changed_file(rng: random.Random, folder: Path) -> Case:
    """A file of conf/ with some bytes or lines changed, or bytes of no file at all."""
    content = bytearray((ROOT / _CONF).read_bytes())
    kind = rng.choice(("flip", "cut", "lines", "noise", "values"))
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "noise":
        content = bytearray(rng.randbytes(rng.choice((1, 20, 3000))))
    else:
        lines = [line for line in content.decode().splitlines() if line and not line.startswith("#")]
        if kind == "lines":
            lines = rng.choices(lines, k=rng.randint(1, 2 * len(lines)))
        else:
            names, values = zip(*(line.split(":", 1) for line in lines), strict=True)
            lines = [f"{name}:{value}" for name, value in zip(names, rng.sample(values, len(values)), strict=True)]
        content = bytearray("\n".join(lines).encode())
    return _given(folder, bytes(content), f"a file of conf/, changed: {kind}")


def _given(folder: Path, text: str | bytes, what: str) -> Case:
    argv = ["-c", write(folder, text), "--dry-run", "--kernels", "plain", "--workers", "0", "--device", "cpu"]
    # What the data or the model say about a value names its key; the files have most of the keys of SMALL.
    names = ("case.yml", *SMALL, "crop_pct", "interpolation", "model", "opt", "sched", "scale", "ratio", "aa", "lr")
    return Case(what, Program(train.main, argv), names=names)
