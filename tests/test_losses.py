"""Training losses against their formulas, and the choice among the published cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.config.parse import config_from
from utils.train.losses import TETLoss, make_train_loss

T, B, K = 3, 4, 5


@pytest.fixture
def batch():
    """Logits `[T, B, K]` in float64, labels `[B]` and soft targets `[B, K]`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, B, K, dtype=torch.float64, generator=generator)
    soft = torch.rand(B, K, dtype=torch.float64, generator=generator)
    return logits, torch.tensor([0, 4, 2, 2]), soft / soft.sum(1, keepdim=True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def by_loops(logits, target, means, lamb):
    """TET, one number after the other."""
    per_step = 0.0
    pull = 0.0
    for t in range(T):
        for b in range(B):
            row = logits[t, b]
            per_step += -(row[target[b]] - row.exp().sum().log()) / (B * T)
            for k in range(K):
                pull += (row[k] - means) ** 2 / (T * B * K)
    return (1 - lamb) * per_step + lamb * pull


@pytest.mark.parametrize(("means", "lamb"), [(1.0, 0.001), (0.5, 0.25), (1.0, 0.0), (2.0, 1.0)])
def test_tet_is_the_mean_loss_of_the_steps_and_a_pull_towards_means(batch, means, lamb):
    logits, target, _ = batch
    close(TETLoss(nn.CrossEntropyLoss(), means, lamb)(logits, target), by_loops(logits, target, means, lamb))


def test_tet_of_one_step_without_pull_is_the_plain_loss(batch):
    logits, target, _ = batch
    close(TETLoss(nn.CrossEntropyLoss())(logits[:1], target), F.cross_entropy(logits[0], target))


def test_tet_differs_from_the_loss_of_the_mean_logits(batch):
    logits, target, _ = batch
    assert TETLoss(nn.CrossEntropyLoss())(logits, target) > F.cross_entropy(logits.mean(0), target)  # Jensen


@pytest.mark.parametrize("lamb", [-0.1, 1.1])
def test_tet_refuses_a_weight_outside_0_and_1(lamb):
    with pytest.raises(ValueError, match=f"TET_lamb={lamb} must lie between 0 and 1"):
        TETLoss(nn.CrossEntropyLoss(), lamb=lamb)


def test_without_mixup_and_smoothing_it_is_cross_entropy(batch):
    logits, target, _ = batch
    loss = make_train_loss(config_from({"smoothing": 0.0}), mixup_active=False)
    close(loss(logits[0], target), F.cross_entropy(logits[0], target))


def test_without_mixup_labels_are_smoothed_by_the_loss(batch):
    logits, target, _ = batch
    loss = make_train_loss(config_from({"smoothing": 0.2}), mixup_active=False)
    targets = F.one_hot(target, K).double() * 0.8 + 0.2 / K
    close(loss(logits[0], target), -(targets * logits[0].log_softmax(1)).sum(1).mean())


def test_with_mixup_the_soft_targets_are_taken_as_they_are(batch):
    logits, _, soft = batch
    loss = make_train_loss(config_from({"mixup": 0.5, "smoothing": 0.2}), mixup_active=True)
    close(loss(logits[0], soft), -(soft * logits[0].log_softmax(1)).sum(1).mean())


def test_the_loss_after_mixup_is_switched_off_smooths_again(batch):
    logits, target, _ = batch
    cfg = config_from({"mixup": 0.5, "smoothing": 0.2, "mixup_off_epoch": 3})
    without = make_train_loss(config_from({"smoothing": 0.2}), mixup_active=False)
    close(make_train_loss(cfg, mixup_active=False)(logits[0], target), without(logits[0], target))


def test_bce_smooths_labels_without_mixup_and_not_soft_targets(batch):
    logits, target, soft = batch
    cfg = config_from({"bce_loss": True, "smoothing": 0.2, "mixup": 0.5})
    smoothed = torch.full((B, K), 0.2 / K, dtype=torch.float64).scatter(1, target[:, None], 0.8 + 0.2 / K)
    plain = make_train_loss(cfg, mixup_active=False)
    close(plain(logits[0], target), F.binary_cross_entropy_with_logits(logits[0], smoothed))
    mixed = make_train_loss(cfg, mixup_active=True)
    close(mixed(logits[0], soft), F.binary_cross_entropy_with_logits(logits[0], soft))


def test_bce_threshold_makes_hard_targets(batch):
    logits, _, soft = batch
    loss = make_train_loss(config_from({"bce_loss": True, "bce_target_thresh": 0.2, "mixup": 0.5}), mixup_active=True)
    hard = (soft > 0.2).double()
    close(loss(logits[0], soft), F.binary_cross_entropy_with_logits(logits[0], hard))


def test_jsd_adds_the_divergence_between_the_copies_of_a_batch(batch):
    _, target, _ = batch
    logits = torch.randn(2 * B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cfg = config_from({"jsd": True, "aug_splits": 2, "smoothing": 0.0, "aa": "rand-m9"})
    p, q = logits[:B].softmax(1), logits[B:].softmax(1)
    mean = (p + q) / 2
    divergence = sum((a * (a.log() - mean.log())).sum(1).mean() for a in (p, q)) / 2
    expected = F.cross_entropy(logits[:B], target) + 12 * divergence  # the weight of the AugMix paper
    close(make_train_loss(cfg, mixup_active=False)(logits, torch.cat([target, target])), expected)


def test_tet_wraps_whichever_loss_was_chosen(batch):
    logits, target, soft = batch
    settings = {"TET": True, "TET_means": 0.5, "TET_lamb": 0.1}
    smoothed = make_train_loss(config_from({"smoothing": 0.2}), mixup_active=False)
    loss = make_train_loss(config_from(settings | {"smoothing": 0.2}), mixup_active=False)
    close(
        loss(logits, target), 0.9 * sum(smoothed(x, target) for x in logits) / T + 0.1 * (logits - 0.5).square().mean()
    )
    mixed = make_train_loss(config_from(settings | {"mixup": 0.5}), mixup_active=True)
    steps = sum(-(soft * x.log_softmax(1)).sum(1).mean() for x in logits) / T
    close(mixed(logits, soft), 0.9 * steps + 0.1 * (logits - 0.5).square().mean())
