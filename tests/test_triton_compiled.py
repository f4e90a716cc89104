"""Every Triton kernel as it would be launched, compiled ahead of time for the GPUs of compute capability 8.0 and 9.0.

Values are tested in Triton's interpreter (tests/triton_interpreter.py). That is not enough: it accepts what the
compiler rejects, and it cannot hold the sizes at which 32-bit offsets go wrong.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_compiler import Launch, recorded

from module.kernels import norm_pool, triton_attention, triton_lif, triton_norm, triton_norm_lif, triton_pool

MODULES = (triton_lif, triton_norm, triton_norm_lif, triton_pool, triton_attention)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Channels (dimension 2 of 5) innermost, and no memory behind it."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x if len(shape) < 5 else torch.empty_like(x.permute(0, 1, 3, 4, 2).contiguous()).permute(0, 1, 4, 2, 3)


def launch_all(dtype: torch.dtype, T: int, shown: int, size: tuple[int, int, int, int], want_decay: bool) -> None:
    """Call every function of the kernels; `shown` steps are given of T."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    B, C, H, W = size
    x, g = empty(shown, *size, dtype=dtype), empty(T, *size, dtype=dtype)
    channels, double = empty(C, dtype=state), empty(C, dtype=torch.float64)
    decay = empty(1, dtype=state).reshape(())
    triton_lif.lif_forward(x, g, decay, 1.0)
    triton_lif.lif_backward(g, x, empty(*x.shape, dtype=dtype), decay, 1.0, 4.0, want_decay)
    triton_norm.batch_affine(x, channels, channels, 1e-5)
    triton_norm.affine_of(x, double, double, channels, channels, 1e-5)
    # Two BatchNorms in a row: as one, without eps.
    triton_norm.affine_of(x, double, double, channels, channels, 0.0)
    triton_norm.bn_add_backward(g, g, channels, double, double, 0.0)
    triton_norm_lif.affine_lif(x, channels, channels, g, decay, 1.0)
    affine = (channels, channels)
    triton_norm_lif.bn_lif_backward(g, None, x, affine, channels, double, double, decay, 1e-5, 1.0, 4.0, want_decay)
    triton_norm.affine_add(x, *affine, x, empty(*x.shape, dtype=dtype))
    triton_norm.affine_add(x, *affine, None, empty(*x.shape, dtype=dtype))
    triton_norm.bn_add_backward(g, g, channels, double, double, 1e-5)
    images = g.flatten(0, 1)
    pooled = empty(T, B, C, (H + 1) // 2, (W + 1) // 2, dtype=dtype).flatten(0, 1)
    winner = empty(*pooled.shape, dtype=torch.uint8)
    pooled_spikes, winners = pooled.unflatten(0, (T, B)), winner.unflatten(0, (T, B))
    if T <= norm_pool.MOST_STEPS:
        for kept in (winners, None):
            triton_norm_lif.affine_lif_pool(x, *affine, pooled_spikes, kept, decay, 1.0)
        tensors = (pooled_spikes, winners, x, affine, channels, double, double, decay)
        triton_norm_lif.bn_lif_backward(*tensors, 1e-5, 1.0, 4.0, want_decay)
    for kept in (winner, None):
        triton_pool.max_pool(images, pooled, kept)
    triton_pool.max_pool_backward(pooled, winner, images)
    bytes_ = torch.empty_like(images, dtype=torch.uint8)
    for kept in (bytes_, None):
        triton_pool.max_pool_neighbours(images, images, kept, H, W, W, C)
    triton_pool.max_pool_neighbours_backward(images, bytes_, images, H, W, W, C)
    triton_pool.max_pool_neighbours(images, images, bytes_, H * W, C, C // 8, 1)
    qkv, kv = empty(T, B, 3 * C, H, W, dtype=dtype), empty(T, B, C, dtype=state)
    three, decays = empty(3 * C, dtype=state), empty(3, dtype=state)  # a time constant each for q, k and v
    triton_norm_lif.affine_lif(qkv, three, three, qkv, decays, 1.0)
    stats = (three, empty(3 * C, dtype=torch.float64), empty(3 * C, dtype=torch.float64))
    triton_norm_lif.bn_lif_backward(qkv, None, qkv, (three, three), *stats, decays, 1e-5, 1.0, 4.0, want_decay)
    bits = triton_attention.kept_of(qkv)
    for kept in (bits, None):
        triton_attention.attend(qkv, kv, g, kept, decay, 0.5)
    triton_attention.attend_backward(g, bits, kv, qkv, decay, 0.5, 4.0, want_decay)


def different(launches: list[Launch]) -> list[Launch]:
    return list({launch.name: launch for launch in launches}.values())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles_without_spills_fused_arithmetic_and_32_bit_products(architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # smaller code, sooner compiled
    launches = recorded(monkeypatch, *MODULES)
    if architecture == 80:
        launch_all(torch.float16, 4, 4, (256, 64, 224, 224), False)  # 3.3e9 elements: more than 32 bits can count
    else:
        launch_all(torch.bfloat16, 8, 1, (2, 48, 7, 7), True)
        few = len(launches)
        launch_all(torch.float32, 16, 16, (2, 64, 7, 7), True)
        launches[few:] = [launch for launch in launches[few:] if "lif_backward" in launch.name]
    for launch in different(launches):
        found = launch.compiled(architecture, tmp_path)
        assert found.spilled == 0, launch.name
        assert not [line for line in found.ttir.splitlines() if "muli" in line and "i32" in line], launch.name
        assert "fma.rn" not in found.ptx, launch.name
