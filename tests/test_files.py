"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import cache_folder, read_text, replacing


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert read_text(tmp_path / "a.txt") == "text"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is no regular file") as caught:
            read_text(path)
        assert caught.value.filename == str(path)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a.txt") as one, replacing(tmp_path / "a.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"  # renamed last


def test_an_interruption_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_cache_folder_is_the_one_of_the_compiled_kernels(monkeypatch, tmp_path):
    from module.kernels import native

    variables = (native.CACHE_VARIABLE, "XDG_CACHE_HOME")
    for name in (*variables, "HOME"):
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert cache_folder() == native.cache_folder()


def test_without_a_home_folder_the_message_says_what_to_set(monkeypatch):
    for name in ("SDT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("utils.files.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine")))
    with pytest.raises(UserError, match=r"no home folder .*set SDT_CACHE_DIR"):
        cache_folder()


def test_what_must_be_durable_is_on_the_disk_before_and_after_its_new_name(tmp_path, monkeypatch):
    done = []

    class Recording:
        """The `os` that files are renamed with."""

        def fsync(self, handle):
            done.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}')).partition('.partial')[0]}")
            os.fsync(handle)

        def replace(self, source, target):
            done.append(f"replace {os.path.basename(target)}")
            os.replace(source, target)

        def __getattr__(self, name):
            return getattr(os, name)

    monkeypatch.setattr("utils.files.os", Recording())
    with replacing(tmp_path / "a.txt", durable=True) as temporary:
        temporary.write_text("new")
    content, *names = done
    assert content.startswith("fsync .a.txt.")
    assert names == ["replace a.txt", f"fsync {tmp_path.name}"]
    with replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("new")
    assert done[3:] == ["replace b.txt"]
