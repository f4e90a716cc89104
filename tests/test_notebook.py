"""The notebook runs from a fresh clone: each of its cells, in order, in an empty output folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import processes
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def run_cells(notebook, epochs):
    """What a notebook server does, without the server; pictures must exist and are not shown."""
    names = {
        "__name__": "__main__",
        "Image": lambda path: Path(path).read_bytes()[:8],
        "display": lambda png: print("shown", png == b"\x89PNG\r\n\x1a\n"),
    }
    changes = {
        "from IPython.display import Image, display": "",
        "EPOCHS = 6": f"EPOCHS = {epochs}",
        "str(EPOCHS)": 'str(EPOCHS), "--warmup-epochs", "0", "--dim", "16", "--epoch-repeats", "0.2"',
    }
    for cell in json.loads(Path(notebook).read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            for old, new in changes.items():
                source = source.replace(old, new)
            exec(source, names)
    return 0


def test_every_cell_of_the_notebook_runs(tmp_path):
    # A clone, so that its output lands in it.
    for name in ("conf", "data", "examples", "module", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "digits-dvs"))
    for name in ("train.py", "firing_num.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    child = processes.start(run_cells, str(NOTEBOOK), 1, cwd=tmp_path)
    (status,) = processes.finish(child)
    said = (tmp_path / "output.txt").read_text()
    assert status == 0, said
    assert said.count("shown True") == 3
    assert "LIF       top-1" in said
    assert "SlowLeak  top-1" in said
    # The neuron of the notebook ran as it is written.
    parts = (tmp_path / "output" / "train" / "tour_slow_leak" / "parts.txt").read_text()
    assert "SlowLeak" in parts
