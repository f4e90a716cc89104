"""python -m utils.prepare: counts, pictures, and one clear line for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recordings import write_gesture
from test_event_sources import GESTURE, pretend

from utils import prepare
from utils.errors import UserError
from utils.events.pictures import colour

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gesture(tmp_path, monkeypatch) -> Path:
    pretend(monkeypatch, GESTURE, write_gesture(tmp_path / "data"))
    return tmp_path


def test_one_command_verifies_converts_counts_and_draws(gesture, capsys) -> None:
    arguments = ["gesture", "--data-dir", str(gesture / "data"), "--time-steps", "5", "--show", "3"]
    assert prepare.main([*arguments, "--output", str(gesture / "pictures")]) == 0
    out = capsys.readouterr().out
    assert "split " in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line and line.split()[-1].isdigit()}
    assert rows["7"] == ["2", "2"]
    assert rows["all"] == ["12", "12"]
    with Image.open(gesture / "pictures" / "gesture.gif") as film:
        assert film.n_frames == 5
    assert (gesture / "pictures" / "gesture.png").stat().st_size > 1000
    # A second call finds everything done.
    assert prepare.main(arguments[:-2]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gesture", "--data-dir", "nowhere"], "nowhere: no files of gesture"),
        (["cifar10-dvs", "--split", "first80"], "--split: event_split"),
        (["cifar10-dvs-tet", "--data-dir", "nowhere"], "nowhere: no files of cifar10-dvs"),
    ],
)
def test_bad_input_is_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        prepare.main(arguments)


def test_bad_input_ends_in_one_line_and_status_2() -> None:
    command = [sys.executable, "-m", "utils.prepare", "gesture", "--time-steps", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prepare.py: error: --time-steps -1: give 1 or more\n"


def test_on_and_off_have_their_own_colours() -> None:
    frames = np.zeros((1, 2, 1, 3))
    frames[0, 0, 0, 0] = frames[0, 1, 0, 1] = 4
    off, on, none = colour(frames)[0, 0]
    assert off.tolist() == [213, 94, 0]
    assert on.tolist() == [0, 114, 178]
    assert none.tolist() == [255, 255, 255]
