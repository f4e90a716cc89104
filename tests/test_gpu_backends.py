"""On a CUDA device: every backend that runs there against SpikingJelly's torch neuron, and the golden model."""

from __future__ import annotations

import pytest
import torch
from golden import load_tensors, model_arguments, relative_error, under
from tiny import neuron_on

from model import sdt
from module.accelerate import accelerate

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
