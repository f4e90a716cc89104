"""Plugins: found, imported once, named when they fail, kept with the run, and there in the processes that load data."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

import processes
import pytest
import torch

from utils.config.parse import config_from
from utils.data.datasets import DATASETS
from utils.data.loaders import build_eval_loader
from utils.errors import UserError
from utils.run import plugins
from utils.run.plugins import import_plugins, keep_copies, record, say_what_changed


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with nothing imported from it; what a test imports is forgotten after it."""
    monkeypatch.setattr(plugins, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before, known = set(sys.modules), dict(DATASETS)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    DATASETS.clear()
    DATASETS.update(known)


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def refused(*paths):
    with pytest.raises(UserError) as caught:
        import_plugins(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plugin_is_imported_once_and_may_import_a_file_beside_it(folder):
    write("here/beside_it.py", "value = 3\n")
    path = write("here/first_plugin.py", "import beside_it\nmade = [beside_it.value]\n")
    import_plugins([path])
    made = sys.modules["first_plugin"].made
    import_plugins([path, str(folder / path)])
    assert sys.modules["first_plugin"].made is made == [3]
    assert [entry["path"] for entry in record()] == [path]
    import_plugins(None)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.py", "plugin: missing.py cannot be read (No such file or directory); paths begin at /"),
        ("notes.txt", "plugin: 'notes.txt' is no Python file; give the path of a file that ends in .py"),
        ("broken.py", "broken.py:2: "),
        ("null.py", "plugin: null.py cannot be compiled"),
        ("ends.py", "plugin: ends.py ended the program (sys.exit) while it was imported"),
        ("refuses.py", "plugin: refuses.py: say what is meant"),
        # Names that Python, an installed package or this repository has.
        ("json.py", "rename the file"),
        ("sys.py", "rename the file"),
        ("model.py", "rename the file"),
        ("a.b.py", "a module's name has no dot; rename the file"),
        ("two/same.py", "one/same.py; rename the file"),
    ],
)
def test_what_cannot_be_imported_is_one_line(path, expected):
    write("notes.txt", "")
    write("broken.py", "x = 1\ny = = 2\n")
    Path("null.py").write_bytes(b"x = 1\0\n")
    write("ends.py", "import sys\nsys.exit(0)\n")
    write("refuses.py", "from utils.errors import UserError\nraise UserError('say what is meant')\n")
    for name in ("json.py", "sys.py", "model.py", "a.b.py", "one/same.py", "two/same.py"):
        write(name, "")
    import_plugins(["one/same.py"])
    assert expected in refused(path)
    assert [entry["path"] for entry in record()] == ["one/same.py"]


def test_an_exception_of_the_plugin_keeps_its_traceback_and_names_the_plugin():
    path = write("fails.py", "def deep():\n    return {}['gone']\n\ndeep()\n")
    with pytest.raises(KeyError) as caught:
        import_plugins([path])
    assert caught.traceback[-1].path.name == "fails.py"
    assert caught.value.__notes__ == ["This happened while the plugin fails.py was imported."]


def test_a_run_keeps_each_plugin_and_its_hash_through_a_change(folder, monkeypatch):
    text = "one = 1\n"
    path = write("kept.py", text)
    keep_copies(folder / "no plugins: not even the folder is there")
    import_plugins([path])
    keep_copies(folder)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert record() == [{"path": path, "sha256": digest, "source": text}]
    assert (folder / "plugins" / "kept.py").read_text() == text

    monkeypatch.setattr(plugins, "_imported", {})
    write(path, text * 2)
    import_plugins([path])
    keep_copies(folder)
    new = hashlib.sha256(text.encode() * 2).hexdigest()
    assert (folder / "plugins" / f"kept-{new[:8]}.py").read_text() == text * 2
    assert (folder / "plugins" / "kept.py").read_text() == text
    sums = (folder / "plugins" / "SHA256SUMS").read_text().splitlines()
    assert sorted(sums) == sorted([f"{digest}  kept.py", f"{new}  kept-{new[:8]}.py"])


def test_a_change_since_the_checkpoint_is_one_line(caplog):
    import_plugins([write("same.py", "x = 1\n"), write("changed.py", "x = 1\n"), write("added.py", "x = 1\n")])
    now = record()[0]["sha256"][:12]
    then = [*record()[:1], {"path": "elsewhere/changed.py", "sha256": "0" * 64}]
    then += [{"path": "gone.py", "sha256": "1" * 64}]
    with caplog.at_level(logging.WARNING):
        say_what_changed({"plugins": record()}, "last.pth.tar")
        assert not caplog.records
        say_what_changed({"plugins": then}, "last.pth.tar")
    (line,) = [record.message for record in caplog.records]
    assert line == (
        "warning: other plugins than in last.pth.tar: changed.py was SHA-256 000000000000 and is SHA-256 "
        f"{now}; gone.py was SHA-256 111111111111 and is not there; added.py was not there and is SHA-256 {now}"
    )


KINDS = """
import sys
import numpy as np
from utils.data.register import register_dataset

class Kinds:
    def __init__(self, cfg, training):
        pass
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return np.full((4, 4), 7, dtype=np.uint8), int("silent_plugin" in sys.modules)

register_dataset("kinds", Kinds, classes=2, input_size=(1, 4, 4))
"""


def test_a_process_that_loads_data_has_the_plugins_even_if_it_was_not_forked():
    paths = [write("kinds_plugin.py", KINDS), write("silent_plugin.py", "")]  # nothing of the second is pickled
    import_plugins(paths)
    cfg = config_from({"plugin": paths, "dataset": "kinds", "num_classes": 2, "in_channels": 1, "workers": 1})
    loader = build_eval_loader(cfg, device=torch.device("cpu"))
    loader.batches.multiprocessing_context = processes._context  # a fork server, which knows of no plugin
    ((images, labels),) = loader
    assert list(images.shape) == [3, 1, 4, 4]
    assert labels.tolist() == [1, 1, 1]
