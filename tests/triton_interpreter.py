"""Run by test_neuron_backends.py with TRITON_INTERPRET=1: the Triton kernels against float64.

Every function of the kernels in each dtype, for several T, odd sizes, an input that is the same at each step, and both
neurons; then the parts of a model, by the proof of `accelerate`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from tiny import neuron_on, tiny
from torch import Tensor, nn

from module.accelerate import accelerate, rows
from module.kernels import attention, batchnorm, norm_pool, pool, triton_device
from module.kernels.batchnorm_twice import bn_bn_add, bn_bn_lif
from module.kernels.cpu import state_dtype
from module.kernels.lif import lif
from module.neuron import make_neuron
from module.v2.block import TransformerBlock
from module.v2.conv import ConvBlock, DownSampling

# Roundings of the dtype; the interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# T steps of [B, C, H, W]; the last is the same at each of three steps. More than one block, and not whole ones.
SHAPES = ((4, 3, 5, 7, 5), (1, 2, 70, 3, 4), (11, 1, 3, 13, 1), (1, 3, 9, 5, 5))
SAME = SHAPES[-1]


def steps_of(shape: tuple[int, ...]) -> int:
    return 3 if shape == SAME else shape[0]


def draw(*shape: int, seed: int = 4) -> Tensor:
    """Values that 16 bits hold exactly, channels innermost."""
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16().half().double()  # the same values in every dtype
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def check(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        size = float(value.double().abs().max().clamp_min(1e-300))
        error = float((actual[name].double() - value).abs().max()) / size
        allowed = 0.0 if name == "spikes" else TOLERANCE[dtype] * (10 if name == "decay" else 1)
        assert error <= allowed, (what, dtype, name, error)


def gradients(out: Tensor, g: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    out.backward(g.to(out.dtype))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_()


# Not tau = 2, with which the decay could be taken for 1 - decay. A learned decay is rounded: no potential may meet the
# threshold then.
SETTINGS: dict[str, dict[str, Any]] = {
    "lif": dict(neuron_args={"tau": 4.0}),
    "plif": dict(v_threshold=0.7, neuron_args={"init_tau": 4.0}),
}


def neurons(dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    x, steps = draw(*shape), steps_of(shape)
    x[0, 0, 0, 0, 0] = 4.0  # charges a LIF neuron to its threshold and not beyond
    g = draw(steps, *shape[1:], seed=5)
    plain = make_neuron(mode, **SETTINGS[mode]).double()
    reference = leaf(x, torch.float64)
    spikes = plain(reference.expand(steps, *shape[1:]))
    expected = {"spikes": spikes.detach()} | gradients(spikes, g, x=reference, **dict(plain.named_parameters()))
    neuron = neuron_on("triton", mode, **SETTINGS[mode])
    neuron = neuron.double() if dtype == torch.float64 else neuron
    own = leaf(x, dtype)
    fired = lif(own, neuron.decay(own), steps, *neuron.constants(), "triton")
    actual = {"spikes": fired.detach()} | gradients(fired, g, x=own, **dict(neuron.named_parameters()))
    for found in (actual, expected):
        found["decay"] = found.pop("w", torch.zeros(()))
    check(f"{mode} {shape}", actual, expected, dtype)


def norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """BatchNorm with a neuron, with a shortcut, and both in evaluation; channels far from zero too."""
    C, steps = shape[2], steps_of(shape)
    x = (draw(*shape) + 8 * torch.arange(C).remainder(3)[:, None, None]).bfloat16().double()
    weight, bias = 0.8 + torch.rand(C).double(), torch.rand(C).double()
    decay = torch.tensor(0.4, dtype=torch.float64)
    results = []
    for kind in (torch.float64, dtype):
        state = state_dtype(kind)
        own, w, b = leaf(x, kind), leaf(weight, state), leaf(bias, state)
        d = leaf(decay, state)
        if kind is torch.float64:
            norm = nn.BatchNorm2d(C, eps=1e-5).double()
            norm.weight, norm.bias = nn.Parameter(w), nn.Parameter(b)
            w, b = norm.weight, norm.bias
            y = norm(own.flatten(0, 1)).unflatten(0, shape[:2])
            # The surrogate of the plain operations: torch's own float64 kernel of the neuron.
            spikes = lif(y, d, steps, 1.0, 4.0, "lean")
            mean, var = x.mean(dim=(0, 1, 3, 4)), x.var(dim=(0, 1, 3, 4), unbiased=False)
        else:
            spikes, mean, var = batchnorm.bn_lif(own, w, b, d, steps, 1e-5, 1.0, 4.0)
        # Where a potential is next to the threshold, rounding decides: those gradients are left out.
        found = {"fired": spikes.detach().double().mean(), "mean": mean, "var": var}
        results.append((found, spikes, (own, w, b, d)))
    (exact, spikes, leaves), (found, fired, own_leaves) = results
    same = bool((spikes == fired).all())
    g = draw(steps, *shape[1:], seed=5)
    names = ("x", "weight", "bias", "decay")
    expected = exact | (gradients(spikes, g, **dict(zip(names, leaves, strict=True))) if same else {})
    actual = found | gradients(fired, g, **dict(zip(names, own_leaves, strict=True)))
    assert same or dtype in (torch.float16, torch.bfloat16, torch.float32), "spikes differ in float64"
    assert (spikes != fired).double().mean() < 0.01
    check(f"BatchNorm and neuron {shape}", actual, expected, dtype)

    residual = draw(*shape, seed=6)
    results = []
    for kind in (torch.float64, dtype):
        own, w, b, r = (
            leaf(x, kind),
            leaf(weight, state_dtype(kind)),
            leaf(bias, state_dtype(kind)),
            leaf(residual, kind),
        )
        if kind is torch.float64:
            out = F.batch_norm(own.flatten(0, 1), None, None, w, b, training=True).unflatten(0, shape[:2]) + r
        else:
            out, *_ = batchnorm.bn_add(own, w, b, r, 1e-5)
        grads = gradients(out, draw(*shape, seed=5), x=own, weight=w, bias=b, residual=r)
        results.append({"out": out.detach()} | grads)
    check(f"BatchNorm and shortcut {shape}", results[1], results[0], dtype)

    with torch.no_grad():
        args = (own.detach(), weight, bias)
        results_added = batchnorm.affine_add(*args, residual.to(dtype))
        affine = x * weight[:, None, None] + bias[:, None, None]
        check("affine", {"out": results_added}, {"out": affine + residual}, dtype)
        fired = batchnorm.affine_lif(*args, d.detach(), steps, 1.0)
        expected_spikes = lif(affine, decay, steps, 1.0, 4.0, "lean")
        assert (fired != expected_spikes).double().mean() < 0.01


def norm_pools(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """BatchNorm, neuron and max-pool at once, against the three after one another in the same dtype."""
    C, steps = shape[2], steps_of(shape)
    x, decay = draw(*shape), torch.tensor(0.4)
    weight, bias = 0.8 + torch.rand(C), torch.rand(C)
    results = []
    for at_once in (False, True):
        state = state_dtype(dtype)
        leaves = dict(x=leaf(x, dtype), weight=leaf(weight, state), bias=leaf(bias, state), decay=leaf(decay, state))
        arguments = (*leaves.values(), steps, 1e-5, 1.0, 4.0)
        if at_once:
            out, mean, var, _ = norm_pool.bn_lif_pool(*arguments, True)
        else:
            spikes, mean, var = batchnorm.bn_lif(*arguments)
            out = pool.max_pool(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        found = {"spikes": out.detach(), "mean": mean, "var": var} | gradients(out, draw(*out.shape, seed=5), **leaves)
        results.append({name: value.double() for name, value in found.items()})
    check(f"BatchNorm, neuron and pool {shape}", results[1], results[0], dtype)
    with torch.no_grad():
        arguments = (x.to(dtype), weight, bias, decay.to(state), steps, 1.0)
        spikes = batchnorm.affine_lif(*arguments)
        expected = F.max_pool2d(spikes.flatten(0, 1), 3, 2, 1).unflatten(0, spikes.shape[:2])
        assert torch.equal(norm_pool.affine_lif_pool(*arguments), expected)


def pools(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    x = draw(1, *size)[0]
    x = x.masked_fill(x < 0, 0.0)  # many equal values
    results = []
    for kind in (torch.float64, dtype):
        own = leaf(x, kind).contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        out = F.max_pool2d(own, 3, 2, 1) if kind is torch.float64 else pool.max_pool(own)
        results.append({"spikes": out.detach()} | gradients(out, draw(1, *out.shape, seed=5)[0], x=own))
    check(f"pool {size}", results[1], results[0], dtype)


def neighbours(dtype: torch.dtype, heads: bool) -> None:
    """The event mode's pool: over the map with channels innermost, and over tokens and channels of each head."""
    x = draw(2, 1, 10, 3, 5).clamp_(min=0.0)  # many equal values
    layer = nn.MaxPool3d((1, 3, 3), 1, (0, 1, 1))
    results = []
    for kind in (torch.float64, dtype):
        own = leaf(x, kind)
        shown = own.flatten(3).unflatten(2, (2, 5)).transpose(3, 4) if heads else own  # [T, B, h, N, D/h]
        out = layer(shown) if kind is torch.float64 else pool.max_pool_neighbours(shown)
        g = draw(*shown.shape, seed=5)
        results.append({"spikes": out.detach()} | gradients(out, g, x=own))
        assert pool.can_pool_neighbours(layer, shown)
        assert out.stride() == shown.stride() or kind is torch.float64
    check(f"pool of neighbours, heads {heads}", results[1], results[0], dtype)


def side_by_side(dtype: torch.dtype) -> None:
    """Three neurons with a time constant each, at once and one by one; training and evaluation."""
    D, state = triton_device.WIDE, state_dtype(dtype)
    x, g = draw(2, 1, 3 * D, 1, 3), draw(2, 1, 3 * D, 1, 3, seed=5)
    weight, bias, decays = 0.8 + torch.rand(3 * D), torch.rand(3 * D), torch.tensor([0.3, 0.4, 0.6])
    results = []
    for pieces in (3, 1):
        leaves = dict(x=leaf(x, dtype), weight=leaf(weight, state), bias=leaf(bias, state), decay=leaf(decays, state))
        parts = zip(*(value.chunk(pieces, 2 if value.dim() > 1 else 0) for value in leaves.values()), strict=True)
        fired, evaluated = [], []
        for own, w, b, d in parts:
            d = d.reshape(()) if pieces == 3 else d
            fired.append(batchnorm.bn_lif(own, w, b, d, 2, 1e-5, 1.0, 4.0)[0])
            evaluated.append(batchnorm.affine_lif(own.detach(), w.detach(), b.detach(), d.detach(), 2, 1.0))
        spikes = torch.cat(fired, 2)
        found = {"spikes": spikes.detach()} | gradients(spikes, g, **leaves)
        results.append({name: value.double() for name, value in found.items()} | {"evaluated": torch.cat(evaluated, 2)})
    check("neurons side by side", results[1], results[0], dtype)


def norms_twice(dtype: torch.dtype) -> None:
    """Two BatchNorms in a row, with a neuron and with a shortcut; one channel hardly varies, so that eps counts."""
    shape = (4, 2, 5, 3, 2)
    x = draw(*shape) * torch.tensor([2**-10, 1.0, 2.0, 1.0, 0.5])[:, None, None]
    norms = 0.8 + torch.rand(4, 5, generator=torch.Generator().manual_seed(7))
    for neuron in (True, False):
        results = []
        for kind in (torch.float64, dtype):
            own, other = leaf(x, kind), leaf(draw(*shape, seed=6), kind)
            w, b, outer_w, outer_b = affine = [leaf(value, state_dtype(kind)) for value in norms]
            decay = leaf(torch.tensor(0.4), state_dtype(kind))
            if kind is torch.float64:
                y = F.batch_norm(own.flatten(0, 1), None, None, w, b, training=True)
                y = F.batch_norm(y, None, None, outer_w, outer_b, training=True).unflatten(0, shape[:2])
                out = lif(y, decay, 4, 1.0, 4.0, "lean") if neuron else y + other
            elif neuron:
                out = bn_bn_lif(own, *affine, decay, 1e-5, 1e-5, 1.0, 4.0)[0]
            else:
                out = bn_bn_add(own, *affine, other, 1e-5, 1e-5)[0]
            leaves = dict(x=own, w=w, outer_w=outer_w, outer_b=outer_b, decay=decay, residual=other)
            found = gradients(out, draw(*shape, seed=5), **leaves)
            results.append({"spikes" if neuron else "sum": out.detach(), "of b": 1 + b.grad} | found)  # that is 0
        check("two BatchNorms", results[1], results[0], dtype)


def attentions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    T, B, D, H, W = shape
    qkv = (draw(T, B, 3 * D, H, W) > 0.5).double()
    results = []
    for kind in (torch.float64, dtype):
        own, d = leaf(qkv, kind), leaf(torch.tensor(0.4), state_dtype(kind))
        if kind is torch.float64:
            q, k, v = own.chunk(3, dim=2)
            mask = lif((k * v).sum(dim=(3, 4), keepdim=True), d, T, 0.5, 4.0, "lean")
            out = q * mask
        else:
            out, *_ = attention.attend(own, d, 0.5, 4.0, True)
            with torch.no_grad():
                assert torch.equal(out, attention.attend(own, d, 0.5, 4.0, False)[0])
        results.append({"spikes": out.detach()} | gradients(out, draw(*shape, seed=5), x=own, decay=d))
    check(f"attention {shape}", results[1], results[0], dtype)


def parts() -> None:
    """The proof at the start accepts the parts of a model, with both neurons, and they are attached."""
    models = [tiny(spike_mode="lif", dvs_mode=True), tiny(spike_mode="plif", embed_dims=64)]
    of_v2 = [DownSampling(3, 4, kernel_size=7, first=True), ConvBlock(4), TransformerBlock(8, num_heads=1)]
    for model in (*models, *of_v2):
        for row in rows(accelerate(model.double(), neuron_backend="triton")):
            assert row.runs_as != "plain", row


def main() -> None:
    for dtype in TOLERANCE:
        for shape in SHAPES if dtype == torch.float32 else SHAPES[1:2] if dtype == torch.float16 else (SAME,):
            for mode in ("lif", "plif"):
                neurons(dtype, shape, mode)
            norms(dtype, shape)
            if (dtype, shape) in ((torch.float32, SHAPES[0]), (torch.bfloat16, SAME)):
                norm_pools(dtype, shape)
            if shape != SAME:
                attentions(dtype, shape)
        for size in ((2, 5, 7, 5), (1, 70, 1, 4), (1, 3, 8, 8)):
            pools(dtype, size)
        for heads in (False, True):
            neighbours(dtype, heads)
    side_by_side(torch.float32)
    for dtype in (torch.float32, torch.float64):
        norms_twice(dtype)
    parts()
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
