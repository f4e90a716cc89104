"""Mixing event samples: a video is mixed as one, and labels follow what was mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.config.parse import config_from
from utils.data.mixing import EventMix, build_mixup, check_boxes
from utils.errors import UserError

B, T, SIDE, K = 6, 4, 16, 10


def config(**settings):
    return config_from({"dataset": "digits-dvs", "num_classes": K, "in_channels": 2, "smoothing": 0.0, **settings})


def videos() -> torch.Tensor:
    """Sample i holds i + 1 everywhere."""
    return torch.arange(1.0, B + 1).view(B, 1, 1, 1, 1).expand(B, T, 2, SIDE, SIDE).clone()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_cuts_one_box_of_space_through_all_frames(mode) -> None:
    mixup = build_mixup(config(cutmix=1.0, mixup_mode=mode))
    np.random.seed(2)
    labels = torch.arange(B)
    mixed, soft = mixup(videos(), labels)
    assert mixed.shape == (B, T, 2, SIDE, SIDE)
    assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed)), "the same box at each step and polarity"
    changed = False
    for i in range(B):
        foreign = mixed[i, 0, 0] != i + 1
        rows, columns = foreign.any(1).sum(), foreign.any(0).sum()
        assert foreign.sum() == rows * columns
        assert float(soft[i, i]) == pytest.approx(1 - float(foreign.float().mean()))
        changed = changed or bool(foreign.any())
    assert changed


def test_settings_reach_mixup() -> None:
    given = dict(mixup=0.3, cutmix=0.6, mixup_prob=0.7, mixup_switch_prob=0.2, mixup_mode="pair", smoothing=0.15)
    mixup = build_mixup(config(**given)).mixup
    found = (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob, mixup.mode)
    assert found == (0.3, 0.6, 0.7, 0.2, "pair")
    assert (mixup.label_smoothing, mixup.num_classes, mixup.cutmix_minmax) == (0.15, K, None)
    assert build_mixup(config(cutmix_minmax=[0.2, 0.8])).mixup.cutmix_minmax == [0.2, 0.8]
    np.random.seed(0)
    _, soft = build_mixup(config(mixup=1e-3, smoothing=0.2))(videos(), torch.arange(B))  # next to nothing is mixed
    assert sorted(soft[0].unique().tolist()) == pytest.approx([0.02, 0.82], abs=1e-3)


def test_mixup_weighs_whole_videos() -> None:
    np.random.seed(0)
    mixed, soft = build_mixup(config(mixup=1.0))(videos(), torch.arange(B))
    weight = soft[0, 0]
    assert torch.allclose(mixed[0], weight * 1.0 + (1 - weight) * B)


def test_event_mix_joins_pairs_along_a_surface_in_space_and_time() -> None:
    np.random.seed(1)
    mix = build_mixup(config(event_mix=1.0))
    assert isinstance(mix, EventMix)
    frames = torch.randint(0, 5, (B, T, 2, SIDE, SIDE)).float()
    mixed, soft = mix(frames, torch.arange(B))
    shapes = set()
    for i in range(B):
        own, other = mixed[i] == frames[i], mixed[i] == frames[i - 1]
        assert bool((own | other).all()), "each place comes from one of the two samples"
        assert float(soft[i].sum()) == pytest.approx(1.0, abs=1e-5)
        # Where the two differ, the mask is visible; the label weight is the share of events.
        mask = (own & ~other).any(dim=1, keepdim=True)
        shapes.add(mask.numpy().tobytes())
    assert len(shapes) == B, "a mask per sample"
    assert {i for i in range(B) if 0 < float(soft[i, i]) < 1}


def test_event_mix_weighs_labels_by_events() -> None:
    np.random.seed(3)
    frames = videos()
    mixed, soft = EventMix(1.0, K, 0.0)(frames, torch.arange(B))
    for i in range(B):
        own = float((mixed[i] == i + 1).sum()) * (i + 1)
        assert float(soft[i, i]) == pytest.approx(own / float(mixed[i].sum()), abs=1e-5)


def test_event_mix_gives_the_other_label_its_share() -> None:
    np.random.seed(3)
    mixed, soft = EventMix(1.0, K, 0.0)(videos(), torch.arange(B))
    for i in range(B):
        sources = set(mixed[i].unique().tolist())  # sample j holds j + 1
        assert sources <= {i + 1, (i - 1) % B + 1}
        assert {int(value) - 1 for value in sources} == set(soft[i].nonzero().flatten().tolist())


def test_event_mix_smooths_labels_and_survives_empty_samples() -> None:
    _, soft = EventMix(1.0, K, 0.1)(torch.zeros(2, T, 2, SIDE, SIDE), torch.tensor([0, 0]))
    assert soft[0].tolist() == pytest.approx([0.91] + [0.01] * 9)


def test_event_mix_beside_mixup_is_refused() -> None:
    with pytest.raises(UserError, match="event_mix 1 cannot be combined with mixup or cutmix"):
        config(event_mix=1.0, mixup=0.5)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"reprob": 0.5}, "reprob 0.5 .*use event_cutout"),
        ({"aug_splits": 2}, "aug_splits 2 does not fit the event data of digits-dvs"),
        ({"train_split_path": "list.txt"}, "use event_split"),
    ],
)
def test_image_settings_that_would_break_event_data_are_refused(setting, remedy) -> None:
    with pytest.raises(UserError, match=remedy):
        config(**setting)


def test_event_settings_on_images_warn() -> None:
    cfg = config_from({"dataset": "digits", "dvs_aug": True, "event_mix": 0.5})
    assert [line.split(":")[1].split()[0] for line in cfg.warnings] == ["dvs_aug", "event_mix"]


@pytest.mark.parametrize(
    ("minmax", "fits"), [([0, 0], False), ([0.99, 0.991], False), ([0.5, 0.5], False), ([0, 0.1], True), ([0, 1], True)]
)
def test_a_range_without_a_side_of_a_box_is_refused_before_the_first_batch(minmax, fits):
    cfg = config_from({"cutmix_minmax": minmax})
    if fits:
        check_boxes(cfg, 32, 16)
    else:
        with pytest.raises(UserError, match=r"cutmix_minmax: .* holds no side of a box"):
            check_boxes(cfg, 32, 16)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "event_mix"])
def test_an_alpha_that_numpy_cannot_draw_from_is_refused(name):
    with pytest.raises(UserError, match=rf"{name} 1e-300 is too small .* use 0 \(off\), or 0.001 or more"):
        config_from({name: 1e-300})
    draws = np.random.default_rng(0).beta(1e-3, 1e-3, size=1000)
    assert np.isfinite(draws).all()
