"""Gradients by Winograd's algorithm are those of the direct sum, and only where they were meant to be used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from module.kernels import cpu as cpu_kernels
from module.kernels import fusion, winograd

pytestmark = pytest.mark.skipif(cpu_kernels.why_unusable() is not None, reason=str(cpu_kernels.why_unusable()))

# Of the largest gradient. The transforms' constants reach 16/9 squared and the sums run over up to 9 * 512 products:
# about 3e-6 is seen, ten times the direct sum's own error in float32.
TOLERANCE = 1e-5

SHAPES = {  # N, C, M, H, W
    "whole tiles": (2, 32, 48, 8, 8),
    "odd": (3, 20, 33, 7, 9),
    "one pixel": (2, 16, 5, 1, 1),
    "one row": (1, 3, 17, 1, 6),
    "many channels": (1, 64, 512, 8, 8),
}


def random(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest one, relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_direct_sums(shape, layout):
    N, C, M, H, W = shape
    grad, weight = random((N, M, H, W)).contiguous(memory_format=layout), random((M, C, 3, 3, 1), 0.1)[..., 0]
    expected = conv2d_input((N, C, H, W), weight.double(), grad.double(), padding=1)
    assert difference(winograd.input_grad(grad, weight), expected) < TOLERANCE
    x = (random((H, N, C, W)).permute(1, 2, 0, 3) > 1).float().contiguous(memory_format=layout)  # spikes
    expected = conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert difference(winograd.weight_grad(x, grad), expected) < TOLERANCE


def test_chunks_of_tiles_join_to_the_whole(monkeypatch):
    x, grad, weight = random((3, 8, 9, 10)), random((3, 16, 9, 10)), random((16, 8, 3, 3, 1))[..., 0]
    whole = winograd.input_grad(grad, weight), winograd.weight_grad(x, grad)
    monkeypatch.setattr(winograd, "_CHUNK", 36 * 24 * 4)  # four tiles at a time, and a rest
    parts = winograd.input_grad(grad, weight), winograd.weight_grad(x, grad)
    for part, expected in zip(parts, whole, strict=True):
        assert difference(part, expected) < TOLERANCE


def test_threads_do_not_change_the_gradient():
    """The sparse engine promises that, and takes its input's gradient from here."""
    grad, weight = random((4, 64, 16, 16)), random((64, 64, 3, 3, 1))[..., 0]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(winograd.input_grad(grad, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_convolution_and_its_other_gradients_are_those_of_torch(has_bias):
    inputs = {"x": random((2, 12, 6, 7)), "weight": random((10, 12, 3, 3, 1))[..., 0]}
    if has_bias:
        inputs["bias"] = random((10,))
    grad = random((2, 10, 6, 7))
    results = []
    for convolve in (winograd.conv3x3, lambda x, w, b: F.conv2d(x, w, b, padding=1)):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        out = convolve(leaves["x"], leaves["weight"], leaves.get("bias"))
        out.backward(grad)
        results.append({"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    ours, theirs = results
    for name, expected in theirs.items():
        assert difference(ours[name], expected) < TOLERANCE, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within opcheck
def test_operators_keep_torchs_contract():
    x, weight = random((2, 4, 5, 6)).requires_grad_(), random((3, 4, 3, 3, 1))[..., 0].contiguous().requires_grad_()
    # The gradients differ from the fake ones' only by rounding; opcheck compares shapes, strides and tracing.
    torch.library.opcheck(winograd.conv3x3, (x, weight, None))
    torch.library.opcheck(winograd.input_grad, (random((2, 3, 5, 6)), weight.detach()))
    torch.library.opcheck(winograd.weight_grad, (x.detach(), random((2, 3, 5, 6))))


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(64, 64, 3, **({"padding": 1, "bias": False} | options))  # type: ignore[arg-type]


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    calls: list[bool] = []
    real = winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: (calls.append(True), real(*args))[1])
    return calls


def test_used_where_it_is_faster(used):
    x = random((2, 1, 64, 4, 4)).requires_grad_()
    fusion.convolved(conv(), x)
    assert used


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (conv(stride=2), {}),
        (conv(padding=0), {}),
        (conv(groups=2), {}),
        (conv(padding_mode="circular"), {}),
        (nn.Conv2d(64, 64, 1), {}),
        (nn.Conv2d(64, 32, 3, padding=1), {}),
        (conv().double(), {"dtype": torch.float64}),
        (conv(), {"grad": False}),
        (conv(), {"autocast": True}),
        (conv(), {"hook": True}),
    ],
    ids=["stride", "no padding", "groups", "circular", "1x1", "few channels", "float64", "no gradient",
         "autocast", "watched"],
)  # fmt: skip
def test_left_to_torch_elsewhere(layer, change, used):
    x = random((2, 1, 64, 4, 4)).to(change.get("dtype", torch.float32)).requires_grad_(change.get("grad", True))
    if change.get("hook"):
        layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in change):
        out = fusion.convolved(layer, x)
    assert not used
    assert out.shape[:2] == x.shape[:2]
