"""The training loop: sums weighed right, and no update from a number that is not finite."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import Linear, lively, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import sdt_v2
from utils.config.parse import config_from
from utils.errors import NonFiniteError
from utils.run.distributed import Process
from utils.run.precision import MOST_SKIPPED_UPDATES, Precision
from utils.train import step as step_module
from utils.train.step import TrainStep, train_one_epoch

CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, device=CPU)
PLAIN = Precision(config_from({}), CPU)
IMAGES, LABELS = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 7


def batches(size, images=IMAGES, labels=LABELS):
    return list(zip(images.split(size), labels.split(size), strict=True))


def train(model, loader, *, lr=0.1, loss_fn=None, precision=PLAIN, on_step=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = TrainStep(model, loss_fn or nn.CrossEntropyLoss(), optimizer, precision, **options)
    return train_one_epoch(step, loader, len(loader), ALONE, on_step=on_step)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_equals_a_plain_loop_and_weighs_the_last_batch_by_its_size():
    model = Linear()
    twin = copy.deepcopy(model)
    steps = []
    result = train(model, batches(10), on_step=lambda sums: steps.append((sums.steps, sums.mean_loss())))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    total, running = 0.0, []
    for step, (x, y) in enumerate(batches(10)):
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x)[0], y)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
        running.append((step + 1, pytest.approx(total / min(10 * (step + 1), 23), rel=1e-6)))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert result.loss == pytest.approx(total / 23, rel=1e-6)
    assert steps == running


def test_mixup_and_the_callback_after_an_update_are_called_at_each_step():
    calls = []

    def mixup(x, y):
        calls.append("mix")
        return x, F.one_hot(y, 7).float()

    train(Linear(), batches(12), mixup=mixup, after_update=lambda: calls.append("updated"))
    assert calls == ["mix", "updated"] * 2


def poisoned(model, loader, **options):
    """The message that training ends in, with the weights checked to be those of before."""
    trained = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(NonFiniteError) as caught:
        train(model, loader, **options)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert not any(module._forward_hooks for module in model.modules())
    return str(caught.value)


def test_a_loss_that_is_not_finite_names_step_and_first_module():
    model = Linear()
    with torch.no_grad():
        model.stem.weight[0, 0] = float("inf")
    message = poisoned(model, batches(10))
    assert message.startswith("the loss is nan in step 0; ")
    assert "the first output that is not finite is that of stem (Linear)" in message
    assert message.endswith("the weights were not updated")


def test_a_bad_batch_is_told_from_a_bad_layer():
    images = IMAGES.clone()
    images[15, 2] = float("nan")
    model = Linear()
    message = poisoned(model, batches(10, images=images), lr=0.0)
    assert "the loss is nan in step 1; the input batch itself is not finite" in message


def test_a_loss_function_that_overflows_is_named():
    class Overflow(nn.Module):
        def forward(self, logits, y):
            return logits.abs().sum() * 1e30 * 1e30

    assert "the loss function itself overflows" in poisoned(Linear(), batches(10), loss_fn=Overflow())


def test_nan_that_spiking_neurons_silence_is_found_in_the_gradients():
    # NaN >= threshold is false: a neuron answers NaN with 0, and the loss looks healthy.
    model = lively(tiny())
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        model.block[0].mlp.fc1_conv.weight[0, 0] = float("nan")
        assert torch.isfinite(F.cross_entropy(model(x)[0], y))
    message = poisoned(model, [(x, y)])
    assert "is not finite in step 0, while the loss is" in message
    assert "the first output that is not finite is that of block.0.mlp.fc1_conv (Conv2d)" in message


def test_an_explosion_behind_silent_neurons_names_the_batchnorm_that_saw_no_variance():
    torch.manual_seed(0)
    model = sdt_v2(embed_dims=(8, 8, 16, 24), depths=(6, 2), num_heads=2, num_classes=4)
    message = poisoned(model, [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))])
    assert "is not finite in step 0, while the loss is" in message
    assert "(the first one block3.0.attn.proj_conv.0.body.1.bn) see one value in the whole batch" in message
    assert "1 / sqrt(eps) = 316: use fewer heads" in message


def test_a_bad_pixel_does_not_reach_the_weights():
    model = lively(tiny())
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    x[2, 1, 3, 3] = float("nan")
    assert "the input batch itself is not finite" in poisoned(model, [(x, y)])


def scaling(first_scale=2.0**16):
    """Loss scaling, which a run has with float16 on CUDA only."""
    precision = Precision(config_from({}), CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)
    return precision


def test_loss_scaling_that_leaves_out_every_update_ends_the_run(monkeypatch):
    most = 5  # of the 40 that a run allows
    monkeypatch.setattr(step_module, "MOST_SKIPPED_UPDATES", most)
    model, precision, done = lively(tiny()), scaling(), []
    with torch.no_grad():
        model.block[0].mlp.fc1_conv.weight[0, 0] = float("nan")
    loader = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))] * (most - 1)
    train(model, loader, precision=precision, on_step=lambda sums: done.append(sums.steps))
    assert len(done) == int(precision.skipped_updates) == most - 1
    message = poisoned(model, loader, precision=precision)  # the count goes on in the next epoch
    assert message.startswith(f"the gradients were not finite in {most} updates in a row by step 0, ")
    assert "the first output that is not finite is that of block.0.mlp.fc1_conv (Conv2d)" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_that_leaves_out_every_update_ends_the_run_one_step_later():
    device = torch.device("cuda")
    model = lively(tiny()).to(device)
    with torch.no_grad():
        model.block[0].mlp.fc1_conv.weight[0, 0] = float("nan")
    precision = Precision(config_from({"amp": True}), device)
    step = TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), precision)
    x, y = torch.randn(4, 3, 16, 16, device=device), torch.tensor([0, 1, 2, 3], device=device)
    for i in range(MOST_SKIPPED_UPDATES):
        step.run(x, y, i, 99)
    with pytest.raises(NonFiniteError, match="fc1_conv"):
        step.run(x, y, MOST_SKIPPED_UPDATES, 99)


class Overflowing(nn.CrossEntropyLoss):
    """A loss whose gradient overflows in the steps that `when` says, counted from 0."""

    def __init__(self, when):
        super().__init__()
        self.when, self.step = when, -1

    def forward(self, logits, y):
        self.step += 1
        if self.when(self.step):
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return super().forward(logits, y)


@pytest.mark.parametrize(
    ("when", "most"), [(lambda step: step < MOST_SKIPPED_UPDATES - 1, MOST_SKIPPED_UPDATES - 1), (lambda s: s % 4, 3)]
)
def test_loss_scaling_that_finds_its_scale_goes_on(when, most):
    model, precision, skipped, before = Linear(), scaling(), [], weights(Linear())
    train(
        model,
        batches(10)[:1] * 2 * MOST_SKIPPED_UPDATES,
        precision=precision,
        loss_fn=Overflowing(when),
        on_step=lambda sums: skipped.append(int(precision.skipped_updates)),
    )
    assert (max(skipped), min(skipped)) == (most, 0)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_mixed_precision_trains_with_float32_logits_in_the_loss():
    precision = Precision(config_from({"amp": True}), CPU)
    seen = []

    class Watch(nn.CrossEntropyLoss):
        def forward(self, logits, y):
            seen.append(logits.dtype)
            return super().forward(logits, y)

    model = Linear()
    before = weights(model)
    result = train(model, batches(10), loss_fn=Watch(), precision=precision)
    assert set(seen) == {torch.float32}
    assert result.loss > 0
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("norm", lambda g: sum(x.square().sum() for x in g).sqrt()), ("value", lambda g: max(x.abs().max() for x in g))],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_before_the_update(mode, limit, scaled):
    model = Linear()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    precision = Precision(config_from({"clip_grad": 1e-3, "clip_mode": mode}), CPU)
    if scaled:  # the scale is taken out before
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(model, batches(23), lr=1.0, precision=precision)
    updates = [p.detach() - before[name] for name, p in model.named_parameters()]
    assert float(limit(updates)) == pytest.approx(1e-3, rel=1e-3)


def test_adaptive_clipping_bounds_each_gradient_by_its_weight():
    """Brock et al. 2021: of each row, the norm of the gradient is at most clip_grad times that of the weight."""
    model = Linear()
    before = weights(model)
    train(model, batches(23), lr=1.0, precision=Precision(config_from({"clip_grad": 1e-4, "clip_mode": "agc"}), CPU))
    updates = (model.state_dict()["stem.weight"] - before["stem.weight"]).norm(dim=1)
    torch.testing.assert_close(updates, 1e-4 * before["stem.weight"].norm(dim=1), rtol=1e-2, atol=0)


def test_mixed_precision_on_cuda_is_that_of_the_published_runs_by_default(monkeypatch):
    """Without a GPU: nothing is computed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = torch.device("cuda")
    with FakeTensorMode():
        made = {name: Precision(config_from({"amp": True} | given), device) for name, given in (
            ("published", {}), ("bfloat16", {"amp_dtype": "bfloat16"}))}  # fmt: skip
        off = Precision(config_from({}), device)
    assert (made["published"].dtype, made["bfloat16"].dtype) == (torch.float16, torch.bfloat16)
    # Loss scaling goes with float16 alone.
    assert [one.scaler.is_enabled() for one in (*made.values(), off)] == [True, False, False]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
