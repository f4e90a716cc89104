"""The compiled max-pool is torch's: values, winners among equals, gradients; and the model uses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sdt
from module.accelerate import accelerate
from module.kernels import cpu as cpu_kernels
from module.kernels import pool as pool_ops
from module.kernels.pool import can_pool, max_pool

pytestmark = pytest.mark.skipif(cpu_kernels.why_unusable() is not None, reason=str(cpu_kernels.why_unusable()))

SHAPES = {
    "even": (2, 8, 16, 12),
    "odd": (3, 5, 7, 9),
    "one pixel": (2, 3, 1, 1),
    "one row": (2, 33, 1, 4),
    "one column": (1, 16, 5, 1),
}


def small_integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values with many ties; channels innermost."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradient_are_those_of_torch(shape, dtype):
    x = small_integers(shape, dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = max_pool(ours), F.max_pool2d(theirs, 3, 2, 1)
    assert torch.equal(y, expected)
    # Integers: their sums are exact in every dtype, so a gradient at another of several equal inputs would show.
    g = small_integers(tuple(y.shape), dtype) * 3 + 1
    y.backward(g)
    expected.backward(g)
    assert torch.equal(ours.grad, theirs.grad)


def test_nan_and_infinity_pass_as_in_torch():
    x = small_integers((1, 4, 6, 6), torch.float32)
    x[0, 0, 2, 3], x[0, 1], x[0, 2, 5, 5] = float("nan"), -float("inf"), float("inf")
    y, expected = max_pool(x), F.max_pool2d(x, 3, 2, 1)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    assert torch.equal(y.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_gradient_in_another_layout():
    x = small_integers((2, 3, 8, 8), torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    max_pool(ours).backward(g)
    F.max_pool2d(theirs, 3, 2, 1).backward(g)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within opcheck
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)
def test_operator_keeps_torchs_contract(dtype):
    x = small_integers((2, 3, 5, 6), dtype)
    torch.library.opcheck(torch.ops.sdt.max_pool, (x.detach().requires_grad_(), True))
    torch.library.opcheck(torch.ops.sdt.max_pool, (x, False))


def test_only_one_byte_per_output_is_kept():
    kept: list[Tensor] = []
    x = small_integers((2, 8, 16, 16), torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = max_pool(x)
    assert sum(t.numel() * t.element_size() for t in kept) == y.numel()


@pytest.mark.parametrize(
    ("pool", "x"),
    [
        (nn.MaxPool2d(3, 2, 1), torch.zeros(2, 3, 4, 4)),  # channels not innermost
        (nn.MaxPool2d(2, 2, 0), small_integers((2, 3, 4, 4), torch.float32)),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), small_integers((2, 3, 4, 4), torch.float32)),
        (nn.MaxPool2d(3, 2, 1), small_integers((2, 3, 4, 4), torch.float16)),
        (nn.Identity(), small_integers((2, 3, 4, 4), torch.float32)),
    ],
    ids=["layout", "geometry", "indices", "dtype", "no pool"],
)
def test_anything_else_is_left_to_torch(pool, x):
    assert not can_pool(pool, x)
    assert can_pool(nn.MaxPool2d(3, 2, 1), small_integers((2, 3, 4, 4), torch.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_model_pools_with_channels_innermost(channels, monkeypatch):
    """One input channel says nothing about its layout; the stages after it must not fall back because of that."""
    calls: list[bool] = []
    monkeypatch.setattr(pool_ops, "max_pool", lambda x: (calls.append(True), max_pool(x))[1])
    model = sdt(
        img_size_h=16, img_size_w=16, in_channels=channels, num_classes=3, embed_dims=16, depths=1, num_heads=2,
        pooling_stat="0011",
    )  # fmt: skip
    accelerate(model, prove=False)
    model.train()(torch.randn(2, channels, 16, 16))[0].sum().backward()
    assert calls == [True, True]
