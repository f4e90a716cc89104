"""Runs tests in a copy of the repository, each time in a new process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .mutant import ROOT

# Imported once, and inherited by every process that runs tests: nothing of the repository itself.
_PRELOADED = ["pytest", "torch", "torchvision", "timm", "spikingjelly.activation_based.neuron", "matplotlib.figure"]
_FIRST_CODE = 100  # added to pytest's exit codes: a process that dies of an error of its own has 1
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_PRELOADED)


def keep_within(folder: Path) -> None:
    """Let nothing that the tests write outlast `folder`; to be called before the first of them runs."""
    # Kernels compiled from a changed source stay out of the user's cache, and no bytecode outlives its source.
    os.environ |= {"SDT_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}


def copy_repository(folder: Path) -> Path:
    """The tracked and the new files of the repository as they are now."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: Iterable[str], timeout: float) -> tuple[int | None, str]:
    """pytest's exit code on these tests, and its output. None: they were killed. Negative: they could not begin."""
    output = folder.parent / f"{folder.name}.txt"
    child = _server.Process(target=_run_pytest, args=(folder, list(tests), output))
    child.start()
    child.join(timeout)
    if (code := child.exitcode) is None:
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGKILL)  # the tests' own children too
        child.join()
        code = -1
    return None if code < 0 else code - _FIRST_CODE, output.read_text(errors="replace")


def _run_pytest(folder: Path, tests: list[str], output: Path) -> None:
    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The copy is imported, not the repository.
    sys.path[:] = [str(folder), *(path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)
                                  or "site-packages" in path)]  # fmt: skip
    os.chdir(folder)
    import pytest

    # Packages that were imported before pytest could rewrite their assertions: a warning would be an error.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(_FIRST_CODE + status)
