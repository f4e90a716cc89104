"""Fixtures of several test files."""

import os
import shutil
from collections import Counter

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Several processes share the cores: more threads than cores make each other wait. Before torch is imported; the
    # child processes of tests inherit it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


def pytest_collection_modifyitems(items):
    """Files with many slow tests first: at the end, short ones keep all processes busy."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def written(tmp_path):
    """Write text to a YAML file and return its path."""

    def write(text):
        path = tmp_path / "a.yml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A folder with a tiny model, in which `measuring.run` measures."""
    import measuring

    path = tmp_path_factory.mktemp("measured")
    measuring.prepare(path)
    return path


@pytest.fixture(scope="session")
def full(measured):
    """One run of firing_num.py with everything on: report.json, and its folder."""
    import measuring

    status, report = measuring.run(measured, "full", "--verify", "--attention-map", "2", "--sweep-T", "1", "4",
                                   "--energy-extras", "neurons", "memory")  # fmt: skip
    assert status == 0
    return report, measured / "out" / "full"


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    """A folder in which the run of tests/test_recovery.py has come to its end."""
    from test_recovery import TINY, run_whole
    from tiny import quick

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yml").write_text(quick(TINY))
    run_whole(folder)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of it for one test."""
    shutil.rmtree(tmp_path)
    shutil.copytree(finished_once, tmp_path)
    return tmp_path
