"""On a CUDA device: every backend that runs there against SpikingJelly's torch neuron, and the golden model."""

from __future__ import annotations

import pytest
import torch
from golden import load_tensors, model_arguments, relative_error, under
from tiny import lively, neuron_on, tiny

from model import sdt
from module.accelerate import accelerate, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("backend", ["cupy", "triton", "lean"])
@pytest.mark.parametrize("mode", ["lif", "plif"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5, 7, 3), (1, 2, 3), (11, 2, 301)], ids=str)
def test_backend_equals_spikingjelly_on_cuda(backend, mode, dtype, shape):
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to("cuda", dtype)
    results = []
    for name in ("torch", backend):
        neuron = neuron_on(name, mode).cuda()
        leaf = x.clone().requires_grad_()
        spikes = neuron(leaf)
        spikes.sum().backward()
        results.append((spikes.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # a rounding to the dtype
    assert torch.allclose(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["triton", "lean", "torch"])
@pytest.mark.parametrize("name", ["image_lif", "image_plif"])
def test_golden_logits_on_cuda(backend, name):
    meta, tensors = load_tensors(name)
    model = sdt(**model_arguments(meta["cfg"])).double()
    model.load_state_dict(under(tensors, "state"), strict=True)
    with torch.no_grad():
        logits, _ = accelerate(model.cuda().eval(), neuron_backend=backend)(tensors["input"].cuda())
    assert relative_error(logits.cpu(), tensors["eval/logits"]) < 1e-9


def innermost(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("backend", ["triton", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_time_constant_away_from_one_half_channels_innermost_and_static_input(backend, dtype, static):
    x = innermost(2 * torch.randn(4, 2, 24, 5, 7, device="cuda")).to(dtype)
    x = x[:1].expand(4, -1, -1, -1, -1) if static else x
    results = []
    for name in ("torch", backend):
        neuron = neuron_on(name, "plif").cuda()
        neuron.w.data.fill_(0.7)
        leaf = x.detach().clone().requires_grad_()
        spikes = neuron(leaf)
        spikes.sum().backward()
        results.append((spikes.detach(), leaf.grad.float(), neuron.w.grad))
    assert torch.equal(results[0][0], results[1][0])
    for expected, actual in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.allclose(expected, actual, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["lif", "plif"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_every_part_passes_its_proof_and_trains_under_autocast(mode, dtype):
    model = lively(tiny(spike_mode=mode, pooling_stat="1111", T=4)).cuda().to(memory_format=torch.channels_last)
    accelerate(model, amp_dtype=dtype)
    assert all(row.runs_as != "plain" and not row.why_not_faster for row in rows(model)), rows(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            logits, _ = model(torch.ones(4, 3, 16, 16, device="cuda") * torch.arange(4, device="cuda").view(4, 1, 1, 1))
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(4, device="cuda"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_more_elements_than_32_bits_can_count():
    N = 2**29 + 1024
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB")
    x = torch.zeros(5, N, dtype=torch.float16, device="cuda")
    x[:, -1024:] = torch.randn(5, 1024, device="cuda")
    expected = neuron_on("lean")(x[:, -1024:].contiguous())
    spikes = neuron_on("triton")(x)
    assert torch.equal(spikes[:, -1024:], expected)
    assert int(spikes.count_nonzero()) == int(expected.count_nonzero())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one():
    model = accelerate(tiny().to("cuda:1"))
    logits, _ = model(torch.randn(2, 3, 16, 16, device="cuda:1"))
    logits.sum().backward()
    assert torch.cuda.current_device() == 0
    assert logits.device.index == 1
