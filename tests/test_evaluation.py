"""The evaluation loop: each sample counted once, whatever the batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import Linear, lively, tiny

from utils.config.parse import config_from
from utils.run.distributed import Process
from utils.run.evaluation import evaluate
from utils.run.precision import Precision

CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, device=CPU)
PLAIN = Precision(config_from({}), CPU)
IMAGES, LABELS = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 7


def batches(size, labels=LABELS):
    return list(zip(IMAGES.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 5, 7, 22, 23])
def test_evaluation_equals_a_plain_computation_for_any_batch_size(size):
    model = Linear()
    result = evaluate(model, batches(size), PLAIN, ALONE)
    with torch.no_grad():
        logits = model(IMAGES)[0].double()
    order = [sorted(range(7), key=row.__getitem__, reverse=True) for row in logits.tolist()]
    top1 = sum(ranked[0] == label for ranked, label in zip(order, LABELS.tolist(), strict=True))
    top5 = sum(label in ranked[:5] for ranked, label in zip(order, LABELS.tolist(), strict=True))
    assert (result.top1, result.top5) == (100 * top1 / 23, 100 * top5 / 23)
    assert 0 < result.top1 < result.top5 < 100
    assert result.loss == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-7)
    assert result.samples == 23
    assert result.images_per_second > 0


def test_logits_of_each_step_are_averaged_in_evaluation():
    stepwise, single = Linear(steps=3), Linear()
    with torch.no_grad():
        single.head.weight *= 2  # the mean of 1, 2 and 3 times the logits
        single.head.bias *= 2
    a, b = (evaluate(model, batches(10), PLAIN, ALONE) for model in (stepwise, single))
    assert (a.top1, a.top5) == (b.top1, b.top5)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_with_fewer_than_five_classes_all_are_in_the_top_five(classes):
    result = evaluate(Linear(classes), batches(6, labels=LABELS % classes), PLAIN, ALONE)
    assert result.top5 == 100
    assert result.top1 < 100


def test_evaluation_switches_to_eval_mode_and_records_no_gradient():
    model = lively(tiny()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, [(torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2]))], PLAIN, ALONE)
    assert not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
