"""From archives in the real formats to event files, interrupted and damaged on the way."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from recordings import CLASSES, some_events, write_cifar10_dvs, write_gesture
from torchvision.datasets.utils import calculate_md5 as md5_of

from utils.errors import UserError
from utils.events import sources as event_sources
from utils.events.download import extract, fetch
from utils.events.files import make_frames, read_events, read_npz, spikingjelly_datasets, whole_file
from utils.events.sources import SOURCES, event_samples, prepare_events
from utils.npz import REAL

CIFAR, GESTURE = SOURCES["cifar10-dvs"], SOURCES["gesture"]


def pretend(monkeypatch: pytest.MonkeyPatch, source, resources) -> None:
    """Let SpikingJelly's reader name these archives instead of the gigabytes of the real set."""
    spikingjelly_datasets()
    module, name = source.reader.split(".")
    reader = getattr(importlib.import_module(f"spikingjelly.datasets.{module}"), name)
    monkeypatch.setattr(reader, "resource_url_md5", staticmethod(lambda: resources))


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    pretend(monkeypatch, CIFAR, write_cifar10_dvs(tmp_path))
    return tmp_path


@pytest.fixture
def gesture(tmp_path, monkeypatch) -> Path:
    pretend(monkeypatch, GESTURE, write_gesture(tmp_path))
    return tmp_path


def test_cifar10_dvs_from_archives_to_events(cifar) -> None:
    samples = prepare_events(CIFAR, cifar)
    assert samples == event_samples(CIFAR, cifar)
    assert samples["cat"] == [f"cifar10_cat_{i}.npz" for i in range(3)]
    written, read = some_events(62, seed=302), read_events(cifar / "events_np" / "cat" / "cifar10_cat_2.npz", 128)
    for key in "txyp":
        np.testing.assert_array_equal(written[key], read[key])


def test_gesture_from_archive_to_events_as_spikingjelly_cuts_them(gesture, tmp_path_factory) -> None:
    samples = prepare_events(GESTURE, gesture)
    assert sum(map(len, samples.values())) == 24
    assert samples["train/7"] == ["user01_lab_0.npz", "user01_lab_1.npz"]
    theirs = tmp_path_factory.mktemp("theirs")
    importlib.import_module("spikingjelly.datasets.dvs128_gesture").DVS128Gesture.create_events_np_files(
        str(gesture / "extract"), str(theirs)
    )
    for folder, names in samples.items():
        assert sorted(path.name for path in (theirs / folder).iterdir()) == names
        for name in names:
            ours, other = read_events(gesture / "events_np" / folder / name, 128), np.load(theirs / folder / name)
            for key in "txyp":
                np.testing.assert_array_equal(ours[key], other[key])


def test_class_folders_are_numbered_as_spikingjelly_numbers_them(gesture) -> None:
    prepare_events(GESTURE, gesture)
    theirs = importlib.import_module("spikingjelly.datasets.dvs128_gesture").DVS128Gesture(str(gesture), train=True)
    assert theirs.classes == GESTURE.classes
    assert GESTURE.classes[2] == "10"


def test_frames_are_spikingjellys_and_its_reader_opens_them(gesture) -> None:
    samples = prepare_events(GESTURE, gesture)
    assert make_frames(gesture, samples, 4, 128) == 24
    reader = importlib.import_module("spikingjelly.datasets.dvs128_gesture").DVS128Gesture
    data = reader(str(gesture), train=False, data_type="frame", frames_number=4, split_by="number")
    events = reader(str(gesture), train=False, data_type="event")
    integrate = spikingjelly_datasets().integrate_events_by_fixed_frames_number
    for (frames, label), (stream, _) in zip(data, events, strict=True):
        np.testing.assert_array_equal(frames, integrate(stream, "number", 4, 128, 128))
        assert frames.sum() == len(stream["t"])
        assert 0 <= label < 11


def test_missing_files_are_listed_with_checksum_address_and_place(tmp_path) -> None:
    for source, count in ((CIFAR, 10), (GESTURE, 4)):
        with pytest.raises(UserError) as error:
            event_samples(source, tmp_path / "nowhere")
        text = str(error.value)
        assert text.count("MD5") == text.count("https://") == count
        assert f"{tmp_path}/nowhere/download" in text
        assert f"python -m utils.prepare {source.name} --data-dir" in text


def test_wrong_and_missing_archives_come_in_one_message(cifar) -> None:
    (cifar / "download" / "cat.zip").write_bytes(b"half")
    (cifar / "download" / "dog.zip").unlink()
    with pytest.raises(UserError) as error:
        prepare_events(CIFAR, cifar)
    text = str(error.value)
    assert "2 file(s) missing or damaged" in text
    assert "cat.zip (4 bytes) has MD5" in text
    assert "dog.zip is missing: MD5" in text
    assert not (cifar / "events_np").exists()


@pytest.fixture
def host(tmp_path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which this machine serves it."""
    (tmp_path / "host").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "host"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield tmp_path / "host", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def test_missing_archives_are_downloaded_and_nothing_else_is(cifar, host, monkeypatch) -> None:
    folder, address = host
    folder.rmdir()
    (cifar / "download").rename(folder)
    resources = [(path.name, f"{address}/{path.name}", md5_of(path)) for path in sorted(folder.iterdir())]
    pretend(monkeypatch, CIFAR, resources)
    assert sum(map(len, prepare_events(CIFAR, cifar, download=True).values())) == 30
    kept = {path: path.stat().st_mtime_ns for path in (cifar / "download").iterdir()}
    (cifar / "download" / "cat.zip").write_bytes(b"half")
    fetch(resources, cifar / "download")
    changed = [path.name for path, when in kept.items() if path.stat().st_mtime_ns != when]
    assert changed == ["cat.zip"]
    assert not list((cifar / "download").glob(".*"))


def test_a_host_that_sends_something_else_or_nothing_is_named(tmp_path, host) -> None:
    folder, address = host
    (folder / "page.html").write_text("<html>please log in</html>")
    url = f"{address}/page.html"
    with pytest.raises(UserError, match=rf"{url} sent something else than cat.zip \(MD5 \w+, expected 0123\)"):
        fetch([("cat.zip", url, "0123")], tmp_path / "download")
    assert not (tmp_path / "download" / "cat.zip").exists()
    with pytest.raises(UserError, match=r"nowhere.zip cannot be downloaded to .*; try again, or put cat.zip there"):
        fetch([("cat.zip", f"{address}/nowhere.zip", "0123")], tmp_path / "download")
    assert not any((tmp_path / "download").iterdir())


def test_gesture_must_be_downloaded_by_hand(tmp_path) -> None:
    with pytest.raises(UserError, match=r"gesture cannot be downloaded by a program\. (?s:.*)DvsGesture\.tar\.gz"):
        prepare_events(GESTURE, tmp_path, download=True)


def test_an_interrupted_conversion_is_refused_and_then_finished(cifar, monkeypatch) -> None:
    write, left = event_sources.write_events, iter(range(17))

    def interrupted(path, events) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, events)

    monkeypatch.setattr(event_sources, "write_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_events(CIFAR, cifar)
    monkeypatch.undo()
    half = {path: path.stat().st_mtime_ns for path in (cifar / "events_np").rglob("*.npz")}
    assert len(half) == 17
    with pytest.raises(UserError, match=r"class folder .* holds no samples; finish it with python -m utils.prepare"):
        event_samples(CIFAR, cifar)
    pretend(monkeypatch, CIFAR, [(p.name, "", md5_of(p)) for p in (cifar / "download").iterdir()])
    samples = prepare_events(CIFAR, cifar)
    assert sum(map(len, samples.values())) == 30
    assert all(path.stat().st_mtime_ns == when for path, when in half.items()), "what was done is not done again"


def test_a_truncated_recording_is_named_and_its_repair_completes_the_set(cifar) -> None:
    prepare_events(CIFAR, cifar)
    recording, events = cifar / "extract" / "frog" / "cifar10_frog_1.aedat", cifar / "events_np" / "frog"
    whole = recording.read_bytes()
    (events / "cifar10_frog_1.npz").unlink()
    with pytest.raises(UserError, match=r"events_np/frog holds 2 of 3 samples; finish it with"):
        event_samples(CIFAR, cifar)
    recording.write_bytes(whole[:-3])
    assert prepare_events(CIFAR, cifar)["frog"], "the archive replaces a recording of another size"
    assert recording.read_bytes() == whole
    (events / "cifar10_frog_1.npz").unlink()
    (cifar / "download").rename(cifar / "gone")
    recording.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"cifar10_frog_1.aedat is damaged: .*; delete it and extract it again"):
        prepare_events(CIFAR, cifar)


def test_an_empty_class_folder_is_refused(cifar) -> None:
    prepare_events(CIFAR, cifar)
    for path in (cifar / "events_np" / "ship").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"class folder .*/events_np/ship holds no samples; finish it"):
        event_samples(CIFAR, cifar)
    (cifar / "download").rename(cifar / "gone")
    for path in (cifar / "extract" / "ship").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"class folder .*/extract/ship holds no recordings; extract its archive"):
        prepare_events(CIFAR, cifar)


def test_a_tree_of_unknown_origin_must_have_the_published_number_of_samples(cifar) -> None:
    prepare_events(CIFAR, cifar)
    (cifar / "prepared.json").unlink()
    with pytest.raises(UserError, match=r"events_np holds 30 samples, the published set 10,000; finish it with"):
        event_samples(CIFAR, cifar)


def test_more_time_steps_than_events_are_refused(cifar) -> None:
    samples = prepare_events(CIFAR, cifar)
    with pytest.raises(UserError, match=r"time_steps: 61 is more than the 60 events in .*/airplane/cifar10_airplane_0"):
        make_frames(cifar, samples, 61, 128)


def test_damaged_frames_are_made_again(cifar) -> None:
    samples = prepare_events(CIFAR, cifar)
    assert make_frames(cifar, samples, 5, 128) == 30
    path = cifar / "frames_number_5_split_by_number" / "bird" / "cifar10_bird_1.npz"
    whole = read_npz(path, {"frames": REAL})["frames"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cifar10_bird_1.npz is damaged .*; delete it and run python -m utils.prepare"):
        read_npz(path, {"frames": REAL})
    assert make_frames(cifar, samples, 5, 128, check=True) == 1
    np.testing.assert_array_equal(read_npz(path, {"frames": REAL})["frames"], whole)


def test_an_archive_that_points_outside_is_refused(cifar, tmp_path_factory) -> None:
    import zipfile

    with zipfile.ZipFile(cifar / "evil.zip", "w") as file:
        file.writestr("../../outside.aedat", b"x")
    with pytest.raises(UserError, match="points outside of"):
        extract(cifar / "evil.zip", cifar / "extract")


@pytest.mark.slow
def test_many_files_are_converted_by_several_processes(cifar, monkeypatch) -> None:
    from utils.events import files as event_files

    samples = prepare_events(CIFAR, cifar)
    monkeypatch.setattr(event_files, "_TRIAL", -1.0)
    monkeypatch.setattr(event_files, "_WORTH_PROCESSES", -1.0)
    monkeypatch.setattr(event_files, "_cores", lambda: 2)
    assert make_frames(cifar, samples, 6, 128) == 30
    assert make_frames(cifar, samples, 6, 128, check=True) == 0


def test_the_manifest_counts_every_class(cifar) -> None:
    prepare_events(CIFAR, cifar)
    content = json.loads((cifar / "prepared.json").read_text())
    assert content == {"dataset": "cifar10-dvs", "samples": dict.fromkeys(CLASSES, 3)}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("disk full\nat 5")])
def test_a_file_that_cannot_be_written_keeps_the_old_one_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.npz"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(UserError, match=r"a\.npz cannot be written: (No space left on device|disk full); free some"):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
