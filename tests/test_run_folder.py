"""A run's folder: locked for one run, and left as it was by a start that comes to nothing."""

from __future__ import annotations

import sys

import pytest

from utils.config.parse import config_from
from utils.errors import UserError
from utils.train.run_folder import LOCK, lock_folder, run_folder


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def earlier_run(folder):
    with lock_folder(folder / "run", keep=False):
        (folder / "run" / "log.txt").write_text("first")


def start(folder, after_writing, keep):
    with lock_folder(folder / "run", keep=keep):
        if after_writing:
            (folder / "run" / "log.txt").write_text("second")
        raise UserError("no such data")


def fail_to_start(folder, *, after_writing=False, keep=False):
    with pytest.raises(UserError, match="no such data"):
        start(folder, after_writing, keep)


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    fail_to_start(tmp_path)
    assert names(tmp_path) == []


def test_a_start_that_fails_puts_the_earlier_run_back(tmp_path):
    earlier_run(tmp_path)
    fail_to_start(tmp_path)
    assert names(tmp_path) == ["run", f"run/{LOCK}", "run/log.txt"]
    assert (tmp_path / "run" / "log.txt").read_text() == "first"


def test_what_a_run_wrote_before_it_failed_is_kept(tmp_path):
    earlier_run(tmp_path)
    fail_to_start(tmp_path, after_writing=True)
    assert (tmp_path / "run.1" / "log.txt").read_text() == "first"
    assert (tmp_path / "run" / "log.txt").read_text() == "second"


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    fail_to_start(tmp_path)
    earlier_run(tmp_path)
    fail_to_start(tmp_path, keep=True)
    assert (tmp_path / "run" / "log.txt").read_text() == "first"


def test_a_second_start_beside_a_live_run_is_refused_and_changes_nothing(tmp_path):
    with lock_folder(tmp_path / "run", keep=False):
        for written in (False, True):
            if written:
                (tmp_path / "run" / "log.txt").write_text("first")
            for keep in (False, True):
                with pytest.raises(UserError, match="in use by another run"), lock_folder(tmp_path / "run", keep=keep):
                    pytest.fail("it began")
            assert names(tmp_path) == ["run", f"run/{LOCK}", *(["run/log.txt"] if written else [])]


def test_without_file_locks_a_run_starts_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with lock_folder(tmp_path / "run", keep=False):
        assert "do not start a second run there" in caplog.text


@pytest.mark.parametrize("key", ["initial_checkpoint", "initial_partial", "resume"])
def test_a_checkpoint_in_the_folder_of_a_new_run_is_refused(tmp_path, key):
    file = tmp_path / "run" / "last.pth.tar"
    new = {"output": str(tmp_path), "experiment": "run", key: str(file), "no_resume_opt": True}
    with pytest.raises(UserError, match=f"{key}: .* lies in .*, where the new run begins"):
        run_folder(config_from(new))
    assert run_folder(config_from(new | {"experiment": "other"})) == tmp_path / "other"
