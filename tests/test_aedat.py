"""The two recording formats, byte by byte, against SpikingJelly's readers, and what damage looks like."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from recordings import aedat2, aedat31, some_events

from utils.errors import UserError
from utils.events.aedat import read_cifar10_dvs, read_gesture, read_gesture_labels
from utils.events.files import spikingjelly_datasets


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return tmp_path / "recording.aedat"


def assert_same(first, second) -> None:
    for key in "txyp":
        np.testing.assert_array_equal(first[key], second[key])


def test_aedat_2_gives_what_was_written_and_what_spikingjelly_reads(recording, monkeypatch) -> None:
    events = some_events(300)
    recording.write_bytes(aedat2(events))
    read = read_cifar10_dvs(recording)
    assert_same(read, events)
    spikingjelly_datasets()
    reader = importlib.import_module("spikingjelly.datasets.cifar10_dvs").CIFAR10DVS
    with monkeypatch.context() as patched:
        # The two parts of NumPy that it needs and that newer or older releases lack.
        patched.setattr(np, "fromstring", lambda data, dtype: np.frombuffer(data, dtype))
        patched.setattr(np, "bool", bool, raising=False)
        theirs = reader.load_origin_data(str(recording))
    assert_same(read, theirs)


def test_aedat_3_gives_what_was_written_and_what_spikingjelly_reads(recording) -> None:
    # Time stamps that pass 2**31, where the packet's overflow counter comes in.
    events = some_events(130, start=2**31 - 500)
    recording.write_bytes(aedat31(events, packet=50))
    read = read_gesture(recording)
    assert_same(read, events)
    assert_same(read, spikingjelly_datasets().load_aedat_v3(str(recording)))


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_truncated_aedat_2_is_refused(recording, cut) -> None:
    recording.write_bytes(aedat2(some_events(5))[:-cut])
    with pytest.raises(
        UserError, match=r"recording.aedat is damaged: \d+ bytes of events are no multiple of 8; delete"
    ):
        read_cifar10_dvs(recording)


@pytest.mark.parametrize(
    ("cut", "message"), [(3, "needs 400 bytes, 397 are left"), (400 + 10, "ends inside the packet header")]
)
def test_a_truncated_aedat_3_is_refused(recording, cut, message) -> None:
    recording.write_bytes(aedat31(some_events(100))[:-cut])
    with pytest.raises(UserError, match=f"recording.aedat is damaged: .*{message}"):
        read_gesture(recording)


@pytest.mark.parametrize("read", [read_cifar10_dvs, read_gesture])
def test_a_file_without_events_is_refused(recording, read) -> None:
    recording.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n")
    with pytest.raises(UserError, match="it holds no events"):
        read(recording)


def test_another_format_is_refused(recording) -> None:
    recording.write_bytes(aedat2(some_events(5)))
    with pytest.raises(UserError, match=r"it has no AEDAT 3.1 header"):
        read_gesture(recording)


@pytest.mark.parametrize("line", ["12,5,6", "0,5,6", "3,5", "3,5,x"])
def test_a_wrong_line_of_labels_is_named(tmp_path, line) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"class,startTime_usec,endTime_usec\n1,2,3\n\n{line}\n")
    with pytest.raises(UserError, match=f"labels.csv, line 4: '{line}' is not class"):
        read_gesture_labels(path)
