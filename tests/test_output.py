"""Output that goes away: no traceback, the status of the program, and its files are whole."""

from __future__ import annotations

import os
import subprocess
import sys

import processes
import pytest
from test_recovery import TINY

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from utils.errors import UserError, run_script

def main(argv):
    {body}

run_script(main)
"""
MANY = "for i in range(20000): print('line', i)\n    print('done', file=sys.stderr); return 3"


def ends(tmp_path, body, redirection, **environment):
    """Run a script whose `main` has this body under a shell, with a redirection."""
    (tmp_path / "tool.py").write_text(SCRIPT.format(root=str(processes.ROOT), body=body))
    line = f"{sys.executable} tool.py {redirection}"
    return subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", ""),
        ("| head -1; exit ${PIPESTATUS[0]}", ""),
        ("> /dev/full", "stdout cannot be written (No space left on device); going on without it\n"),
        (">&-", ""),
        ("> /dev/null", ""),
    ],
)
def test_a_program_goes_on_without_its_output(tmp_path, redirection, said):
    done = ends(tmp_path, MANY, redirection)
    assert done.returncode == 3
    assert done.stderr in (f"{said}done\n", f"done\n{said}")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_a_message_that_nobody_sees_has_its_status_all_the_same(tmp_path, redirection):
    assert ends(tmp_path, "raise UserError('lr: x')", redirection).returncode == 2


def test_files_do_not_get_what_was_meant_for_a_closed_output(tmp_path):
    body = "f = open('file', 'w'); print('a'); sys.stdout.flush(); os.write(1, b'b'); f.write('c'); f.close(); return 0"
    assert ends(tmp_path, body, ">&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == "c"


def test_characters_that_the_output_lacks_are_escaped(tmp_path):
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = ends(tmp_path, "print('caf\\xe9'); raise UserError('caf\\xe9')", "", **ascii_alone)
    assert (done.stdout, done.stderr) == ("caf\\xe9\n", "tool.py: error: caf\\xe9\n")


@pytest.mark.parametrize("prog", ["train.py", "firing_num.py"])
def test_help_into_a_pipe_that_is_closed(prog):
    line = f"{sys.executable} {processes.ROOT / prog} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def train_into_a_closed_pipe(argv):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = sys.__stdout__
    processes.train(argv)


def test_a_run_whose_log_nobody_reads_is_complete(tmp_path):
    (tmp_path / "tiny.yml").write_text(TINY)
    argv = ["-c", "tiny.yml", "--experiment", "run", "--epochs", "1", "--cooldown-epochs", "0", "-j", "0"]
    assert processes.finish(processes.start(train_into_a_closed_pipe, argv, cwd=tmp_path)) == [0]
    folder = tmp_path / "output" / "train" / "run"
    assert {"summary.csv", "last.pth.tar", "curves.png", "log.txt"} <= {path.name for path in folder.iterdir()}
    assert "epoch 1/1  lr" in (folder / "log.txt").read_text()
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
