"""Imports run one way, name what they import, and stay light until a command line is parsed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "model")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "module/**/*.py", "utils/**/*.py", "tests/*.py", "benchmarks/**/*.py", "data/**/*.py")
    for path in ROOT.glob(pattern)
    if "embedded" not in path.parts
)
OURS = {"model", "module", "utils", "tests", "benchmarks", *SCRIPTS}
# Where a file lives -> which of our own packages it may import, in functions and for types as well.
ALLOWED = {"module": {"module"}, "utils": {"utils"}, "model": {"module"}}
FOR_SCRIPTS = {"utils", "model", "module"}
# What takes seconds to import.
HEAVY = ("torch", "timm", "torchvision", "spikingjelly", "numpy", "matplotlib", "tensorboard")

# Each imports only itself and what is left of it; and of these two, neither the other.
UTILS = (
    "output",
    "errors",
    "files",
    "schema",
    "torch_file",
    "npz",
    "config",
    "events",
    "data",
    "run",
    "measure",
    "train",
    "report",
)
APART = {"train", "report"}
COMMANDS = {"doctor", "export", "predict", "prepare"}  # `python -m utils.NAME`: may import what a script may
# The one file that attaches faster ways to a model, and the one file of utils that calls it.
ACCELERATE, BUILD = "module/accelerate.py", "utils/run/build.py"
FAMILY = "utils/measure/family.py"
FAMILIES = ("sdt", "sdt_v2")
# (file, what it imports against a rule): pairs that still have to go.
EXCEPTIONS: set[tuple[str, str]] = set()


def imported(path):
    """The dotted modules that a file imports anywhere, and whether it imports a star."""
    names, star = [], False
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from utils.measure import firing` imports utils.measure.firing.
            parts = [f"{node.module}.{alias.name}" for alias in node.names if is_ours(f"{node.module}.{alias.name}")]
            names += parts or [node.module]
            star = star or any(alias.name == "*" for alias in node.names)
    return names, star


def is_ours(module):
    """Whether a dotted name is a file or a package of this repository."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def against_the_order(path):
    """What `path` imports that it must not, by the order of the packages."""
    names, _ = imported(path)
    parts = path.removesuffix(".py").split("/")
    top, own = parts[0], parts[1] if len(parts) > 1 else ""
    if top in ("tests", "benchmarks", "data"):
        return
    is_command = top == "utils" and own in COMMANDS
    allowed = FOR_SCRIPTS if top in SCRIPTS or is_command else ALLOWED[top]
    for name in names:
        package, *rest = name.split(".")
        if package not in OURS or (path == BUILD and name == "module.accelerate"):
            continue
        plain = top == "model" or (top == "module" and own not in ("kernels", "sparse"))
        wrong = package not in allowed or (plain and path != ACCELERATE and rest[:1] in (["kernels"], ["sparse"]))
        if package == top == "utils" and own in UTILS and rest and rest[0] != own:
            wrong = rest[0] not in UTILS[: UTILS.index(own)] or {rest[0], own} == APART
        if package == "utils" and rest[:1] == ["measure"] and len(rest) > 1 and rest[1] in FAMILIES:
            wrong = wrong or (path != FAMILY and not path.startswith(f"utils/measure/{rest[1]}/"))
        if wrong:
            yield path, name


def test_the_rules_below_see_the_files():
    assert {"train.py", "firing_num.py", "model.py", "module/neuron.py", "utils/train/step.py"} <= set(FILES)
    assert {"train", "firing_num"} <= set(SCRIPTS)
    entries = {path.stem for path in (ROOT / "utils").iterdir() if is_ours(f"utils.{path.stem}")}
    assert entries == {"__init__", *UTILS, *COMMANDS}


@pytest.mark.parametrize("path", FILES)
def test_imports_run_one_way(path):
    assert not imported(path)[1], "star import"
    assert set(against_the_order(path)) <= EXCEPTIONS


def test_no_exception_is_out_of_date():
    assert {found for path in FILES for found in against_the_order(path)} >= EXCEPTIONS


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("utils") and path.endswith("__init__.py")])
def test_a_package_is_a_docstring(path):
    statements = ast.parse((ROOT / path).read_text()).body
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))
    names = [ast.unparse(s.targets[0]) if isinstance(s, ast.Assign) else type(s).__name__ for s in statements[1:]]
    assert names == (["ImportFrom", "ROOT"] if path == "utils/__init__.py" else [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered_without_the_heavy_imports(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        f"    print('\\nENDS', end.code, [name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert f"usage: {script}.py" in done.stdout
    assert done.stdout.splitlines()[-1] == "ENDS 0 []"


@pytest.mark.parametrize("script", ["train", "firing_num"])
def test_a_wrong_setting_is_answered_without_the_heavy_imports_by_status_2(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--batchsize', '3']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        f"    print(end.code, [name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == "2 []\n"
    assert done.stderr == f"{script}.py: error: --batchsize: unknown option; did you mean --batch-size?\n"


def test_importing_the_model_has_no_side_effect_on_a_cpu():
    code = (
        "import torch; before = torch.get_rng_state(); import model; print(torch.equal(before, torch.get_rng_state()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
