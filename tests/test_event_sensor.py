"""The simulated camera: thresholds, polarity, times, refractory time and noise; and the embedded set it records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.events import digits as digits_dvs
from utils.events.digits import DIGITS_FILE, expected_files, gaze, scene, simulate
from utils.events.sensor import EventSensor

QUIET = dict(mismatch=0.0, noise_rate=0.0, refractory=0)


def ramp(slope: float, size: int = 2):
    """Log intensity that grows by `slope` per second, the same at all pixels of one scene."""
    return lambda t: np.exp(np.full((1, size, size), slope * t * 1e-6))


@pytest.mark.parametrize("step", [1_000, 100_000, 1_000_000])
def test_a_ramp_gives_an_event_at_each_threshold_however_coarse_the_images(step) -> None:
    sensor = EventSensor(2, 2, threshold=0.3, **QUIET)
    (events,) = sensor.record(ramp(1.0), 1_000_000, step, [(0,)])
    assert sorted(set(events["t"].tolist())) == [300_000, 600_000, 900_000]
    assert len(events["t"]) == 12
    assert set(events["p"].tolist()) == {1}


def test_darker_gives_off_events() -> None:
    (events,) = EventSensor(2, 2, threshold=0.3, **QUIET).record(ramp(-1.0), 1_000_000, 10_000, [(0,)])
    assert set(events["p"].tolist()) == {0}
    assert len(events["t"]) == 12


def test_a_constant_scene_gives_noise_only() -> None:
    sensor = EventSensor(50, 50, noise_rate=10.0)
    (events,) = sensor.record(ramp(0.0, 50), 1_000_000, 10_000, [(7,)])
    assert len(events["t"]) == pytest.approx(25_000, rel=0.03)
    assert events["p"].mean() == pytest.approx(0.5, abs=0.02)
    assert not EventSensor(50, 50, noise_rate=0.0).record(ramp(0.0, 50), 10_000, 1_000, [(7,)])[0]["t"].size


def test_the_refractory_time_separates_the_events_of_a_pixel() -> None:
    for refractory, least in ((0, 5_000), (12_000, 15_000)):
        sensor = EventSensor(1, 1, threshold=0.1, mismatch=0.0, noise_rate=0.0, refractory=refractory)
        (events,) = sensor.record(ramp(20.0, 1), 1_000_000, 3_000, [(0,)])
        assert np.diff(events["t"]).min() == least


def test_thresholds_differ_by_pixel_and_stay_those_of_the_camera() -> None:
    first, again, other = (EventSensor(8, 8, seed=seed).thresholds() for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (2, 8, 8)
    assert first.std() > 0.01


def test_events_come_in_order_of_time_and_inside_the_sensor() -> None:
    with np.load(DIGITS_FILE) as content:
        images = (content["images"][:3].astype(np.uint16) * 255 // 16).astype(np.uint8)
    for events in simulate(images, np.arange(3)):
        assert (np.diff(events["t"]) >= 0).all()
        assert events["t"].max() <= 300_000
        assert max(events["x"].max(), events["y"].max()) < digits_dvs.SIDE
        assert set(events["p"].tolist()) == {0, 1}


def test_a_digit_gives_the_same_events_alone_and_in_a_batch() -> None:
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8)).astype(np.uint8)
    together, alone = simulate(images, np.array([5, 6, 7]))[1], simulate(images[1:2], np.array([6]))[0]
    for key in "txyp":
        np.testing.assert_array_equal(together[key], alone[key])


def test_the_gaze_starts_and_ends_at_one_place_and_the_image_moves_with_it() -> None:
    assert gaze(0.0) == gaze(300_000.0) == (-3.0, -3.0)
    image = np.zeros((1, 8, 8), np.uint8)
    image[0, 2:5, 3:6] = 255
    seen = scene(image)
    rows, columns = np.indices((digits_dvs.SIDE, digits_dvs.SIDE))

    def centre(t: float) -> np.ndarray:
        weight = seen(t)[0] - 0.1
        return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()

    np.testing.assert_allclose(centre(130_000) - centre(0), np.array(gaze(130_000)) - gaze(0), atol=1e-9)


def test_the_set_is_made_once_and_completed_where_files_are_missing(tmp_path: Path, monkeypatch) -> None:
    expected = expected_files()
    assert len(expected) == 1797
    folders = {path.rpartition("/")[0]: path for path in expected}
    assert len(folders) == 20
    monkeypatch.setattr(digits_dvs, "expected_files", lambda: {path: expected[path] for path in folders.values()})
    digits_dvs.complete(tmp_path)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    assert len(made) == 20
    victim = next(iter(made))
    victim.unlink()
    when = {path: path.stat().st_mtime_ns for path in made if path != victim}
    digits_dvs.complete(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.npz")} == made
    assert all(path.stat().st_mtime_ns == before for path, before in when.items()), "what is there is not made again"
