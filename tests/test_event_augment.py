"""Augmentations of events: what each does to one sample, and that it does so to all of its frames alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from utils.config.parse import config_from
from utils.events import augment as event_augment
from utils.events.augment import cutout, drop_area, drop_events, drop_random, drop_time, flip, frame_operations, trivial

T, SIDE = 3, 32
RANDOM = {
    "flip": lambda x: flip(x, 0.5),
    "roll": lambda x: event_augment.roll(x, 5),
    "rotate": lambda x: event_augment.rotate(x, 30.0),
    "shear": lambda x: event_augment.shear(x, 0.3),
    "cutout": lambda x: cutout(x, 8),
    "trivial": trivial,
}


def counts(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 9, (T, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("name", RANDOM)
def test_all_frames_of_a_sample_change_alike_and_samples_differ(name) -> None:
    one = counts()[:1].expand(T, -1, -1, -1)
    results = []
    for seed in range(12):
        torch.manual_seed(seed)
        result = RANDOM[name](one)
        assert torch.equal(result, result[:1].expand_as(result))
        torch.manual_seed(seed)
        assert torch.equal(RANDOM[name](one), result)
        assert set(result.unique().tolist()) <= set(range(9)), "counts must stay counts"
        results.append(result)
    assert len({result.numpy().tobytes() for result in results}) >= 2
    assert torch.equal(one, counts()[:1].expand(T, -1, -1, -1)), "the sample itself must not change"


def test_flip_mirrors_left_and_right() -> None:
    assert torch.equal(flip(counts(), 1.0), counts().flip(-1))
    assert torch.equal(flip(counts(), 0.0), counts())


def test_roll_keeps_every_event() -> None:
    torch.manual_seed(1)
    rolled = event_augment.roll(counts(), 5)
    assert not torch.equal(rolled, counts())
    assert torch.equal(rolled.sum(dim=(2, 3)), counts().sum(dim=(2, 3)))


def test_roll_shifts_each_axis_by_itself_up_to_the_limit() -> None:
    frames = torch.zeros(1, 2, SIDE, SIDE)
    frames[0, 0, 10, 20] = 1.0
    shifts = set()
    for seed in range(400):
        torch.manual_seed(seed)
        _, _, y, x = event_augment.roll(frames, 2).nonzero()[0].tolist()
        shifts.add((y - 10, x - 20))
    assert shifts == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_cutout_is_one_square_that_may_reach_over_the_edge() -> None:
    areas = set()
    for seed in range(60):
        torch.manual_seed(seed)
        hole = cutout(torch.ones(T, 2, SIDE, SIDE), 8)[0, 0] == 0
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
        assert 4 <= min(rows, columns) <= max(rows, columns) <= 8
        areas.add(int(hole.sum()))
    assert max(areas) == 64
    assert min(areas) < 64


def test_rotation_is_torchvisions() -> None:
    frames = counts()
    torch.manual_seed(3)
    turned = event_augment.rotate(frames, 30.0)
    torch.manual_seed(3)
    angle = -30.0 + 60.0 * float(torch.rand(()))
    # affine turns clockwise, rotate counter-clockwise; rounding may move single pixels at a tie
    assert (turned == F.rotate(frames, -angle)).float().mean() > 0.99


def test_the_published_set_has_five_operations_with_their_strengths(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(event_augment, "_affine", lambda frames, **how: seen.append(how) or frames)
    torch.manual_seed(0)
    for _ in range(2000):
        trivial(counts())
    angles = {how["angle"] for how in seen if "angle" in how}
    shears = {round(how["shear"], 6) for how in seen if "shear" in how}
    shifts = {how["shift"] for how in seen if "shift" in how}
    assert 1500 < len(seen) < 1700, "identity is one operation in five"
    assert (min(angles), max(angles), len(angles)) == (-30.0, 30.0, 31)
    assert (min(shears), max(shears), len(shears)) == (-0.3, 0.3, 31)
    assert shifts == {(n, 0) for n in range(-5, 6)} | {(0, n) for n in range(-5, 6)}


def stream(count: int = 4000) -> dict[str, np.ndarray]:
    generator = np.random.RandomState(0)
    events = {key: generator.randint(0, limit, count) for key, limit in (("x", SIDE), ("y", SIDE), ("p", 2))}
    return {"t": np.sort(generator.randint(500, 10_000, count)), **events}


def test_dropped_time_is_one_stretch() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        kept = drop_time(stream(), SIDE)
        assert kept.mean() < 0.99
        t = stream()["t"]
        dropped = t[~kept]
        assert not ((t[kept] >= dropped.min()) & (t[kept] <= dropped.max())).any()


def test_dropped_area_is_one_square_of_at_most_a_quarter_of_the_side() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        events = stream()
        gone = ~drop_area(events, SIDE)
        if gone.any():
            x, y = events["x"], events["y"]
            inside = (x >= x[gone].min()) & (x <= x[gone].max()) & (y >= y[gone].min()) & (y <= y[gone].max())
            assert np.array_equal(inside, gone)
            assert max(np.ptp(x[gone]), np.ptp(y[gone])) < SIDE / 4


def test_random_dropping_takes_a_tenth_to_nine_tenths() -> None:
    shares = set()
    for seed in range(60):
        torch.manual_seed(seed)
        shares.add(round(1 - drop_random(stream(), SIDE).mean(), 3))
    assert shares == {n / 10 for n in range(1, 10)}


def test_random_dropping_takes_events_from_all_of_the_recording() -> None:
    torch.manual_seed(0)
    tenths = np.array_split(drop_random(stream(), SIDE), 10)
    shares = [1 - part.mean() for part in tenths]
    assert max(shares) - min(shares) < 0.2


def test_event_drop_chooses_among_four_and_leaves_enough_for_the_frames() -> None:
    sizes = []
    for seed in range(100):
        torch.manual_seed(seed)
        result = drop_events(stream(), SIDE, least=10)
        assert len({len(values) for values in result.values()}) == 1
        sizes.append(len(result["t"]))
        assert len(drop_events(stream(), SIDE, least=4000)["t"]) == 4000
    assert 15 <= sizes.count(4000) <= 40
    assert len(set(sizes)) > 30


def test_settings_choose_the_operations_and_no_aug_none() -> None:
    def chosen(**settings) -> int:
        return len(frame_operations(config_from({"dataset": "gesture", **settings})))

    every = dict(event_hflip=0.5, event_roll=5, event_rotate=10, event_shear=0.1, dvs_aug=True, dvs_trival_aug=True)
    assert (chosen(), chosen(**every), chosen(**every, no_aug=True)) == (0, 6, 0)
    (hole,) = frame_operations(config_from({"dataset": "gesture", "dvs_aug": True}))
    assert max(int((hole(torch.ones(1, 1, 64, 64)) == 0).sum()) for _ in range(30)) == 16 * 16
