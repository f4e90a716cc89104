"""How a script ends: status 2 and one message for what a user can put right, a traceback for a defect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import INTERRUPTED, USAGE_ERROR, UserError, did_you_mean, nearest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from utils.errors import UserError, run_script

def main(argv):
    {body}

run_script(main)
"""


def ends(tmp_path, body, *argv):
    """Run a script whose `main` has this body."""
    script = tmp_path / "tool.py"
    script.write_text(SCRIPT.format(root=str(ROOT), body=body))
    return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=300, check=False)


def test_a_user_error_is_one_message_and_status_2(tmp_path):
    done = ends(tmp_path, "raise UserError('lr: -1 must be at least 0')")
    assert (done.returncode, done.stdout) == (USAGE_ERROR, "") == (2, "")
    assert done.stderr == "tool.py: error: lr: -1 must be at least 0\n"


def test_ctrl_c_is_one_line_and_the_status_of_a_shell(tmp_path):
    # A shell starts its background jobs with SIGINT ignored, the tests perhaps among them.
    listen = "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = ends(tmp_path, f"{listen}; os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    assert done.returncode == INTERRUPTED == 130
    assert done.stderr == "tool.py: interrupted\n"


@pytest.mark.parametrize("error", ["ValueError('of the program')", "RuntimeError('of the program')"])
def test_a_defect_keeps_its_traceback(tmp_path, error):
    done = ends(tmp_path, f"raise {error}")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "of the program" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_of_main_is_that_of_the_script(tmp_path, status):
    assert ends(tmp_path, f"return {status}").returncode == status


def test_main_gets_the_arguments_without_the_script_name(tmp_path):
    assert ends(tmp_path, "print(argv); return 0", "-c", "a b").stdout == "['-c', 'a b']\n"


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Batch_Size", "batch-size"), ("--batch-size", "batch-size"), ("bach-size", "batch-size"), ("xyz", None)],
)
def test_nearest_name_ignores_case_and_separators(name, expected):
    valid = ["batch-size", "lr"]
    assert nearest(name, valid) == expected
    assert did_you_mean(name, valid) == (f"; did you mean {expected}?" if expected else "")
