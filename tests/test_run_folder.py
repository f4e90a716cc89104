"""A run's folder: locked for one run, and left as it was by a start that comes to nothing."""

from __future__ import annotations

import sys

import pytest

from utils.config.parse import config_from
from utils.errors import UserError
from utils.run.folder import LOCK, lock_folder
from utils.train.run_folder import resumes_in_place, run_folder


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


def test_a_run_goes_on_in_the_folder_of_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "output/train/run"
    folder.mkdir(parents=True)
    for written in ("output/train/run/last.pth.tar", "output/train/../train/run/last.pth.tar", str(folder / "a.pth")):
        cfg = config_from({"resume": written, "experiment": "run"})
        assert run_folder(cfg).resolve() == folder
        assert resumes_in_place(cfg, run_folder(cfg))
        alone = config_from({"resume": written})
        assert run_folder(alone).resolve() == folder
        assert resumes_in_place(alone, run_folder(alone))
        weights_only = config_from({"resume": written, "no_resume_opt": True, "experiment": "other"})
        assert not resumes_in_place(weights_only, run_folder(weights_only))
        assert not resumes_in_place(config_from({"resume": written, "no_resume_opt": True}), folder)
    elsewhere = config_from({"resume": "output/train/run/last.pth.tar", "experiment": "other"})
    assert run_folder(elsewhere).resolve() == folder.parent / "other"
    assert not resumes_in_place(elsewhere, run_folder(elsewhere))
    assert resumes_in_place(config_from({"resume": "auto", "experiment": "run"}), folder)
    assert not resumes_in_place(config_from({"experiment": "run"}), folder)
