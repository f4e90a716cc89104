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


def imported(path):
    """The dotted modules that a file imports anywhere, and whether it imports a star."""
    names, star = [], False
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.append(node.module)
            star = star or any(alias.name == "*" for alias in node.names)
    return names, star


def test_the_rules_below_see_the_files():
    assert {"train.py", "firing_num.py", "model.py", "module/neuron.py", "utils/train/step.py"} <= set(FILES)
    assert {"train", "firing_num"} <= set(SCRIPTS)


@pytest.mark.parametrize("path", FILES)
def test_imports_run_from_scripts_to_utils_and_model_to_module(path):
    names, star = imported(path)
    assert not star, "star import"
    top = path.split("/")[0].removesuffix(".py")
    if top in ("tests", "benchmarks", "data"):
        return
    allowed = FOR_SCRIPTS if top in SCRIPTS else ALLOWED[top]
    assert {name.split(".")[0] for name in names} & OURS <= allowed


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
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
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
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 []\n"
    assert done.stderr == f"{script}.py: error: --batchsize: unknown option; did you mean --batch-size?\n"


def test_importing_the_model_has_no_side_effect_on_a_cpu():
    code = (
        "import torch; before = torch.get_rng_state(); import model; print(torch.equal(before, torch.get_rng_state()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
