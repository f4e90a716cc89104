"""Run by test_neuron_backends.py with TRITON_INTERPRET=1: the Triton kernels against SpikingJelly's torch neuron."""

from __future__ import annotations

import torch
from tiny import neuron_on

from module.kernels.lif import lif

# As in the tests of the other backends; the interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def main() -> None:
    count = 0
    for dtype, tolerance in TOLERANCE.items():
        for mode in ("lif", "plif"):
            # 11 steps take the other path of the backward kernel; 5 * 3 * 71 elements are more than one block.
            for shape in ((4, 3, 5, 71), (1, 2, 3), (11, 2, 13), (1, 5, 7)):
                random = torch.Generator().manual_seed(4)
                x = (2 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
                steps = 3 if shape == (1, 5, 7) else shape[0]  # the same input at each step
                g = torch.randn((steps, *shape[1:]), generator=random, dtype=torch.float64).to(dtype)
                compare(mode, x, g, steps, tolerance)
                count += 1
    print(f"{count} comparisons")


def compare(mode: str, x: torch.Tensor, g: torch.Tensor, steps: int, tolerance: float) -> None:
    results = []
    for backend in ("torch", "triton"):
        neuron = neuron_on(backend, mode)
        if x.dtype == torch.float64:
            neuron = neuron.double()
        leaf = x.clone().requires_grad_()
        if backend == "torch":
            spikes = neuron(leaf.expand(steps, *x.shape[1:]) if steps != len(x) else leaf)
        else:
            spikes = lif(leaf, neuron.decay(leaf), steps, *neuron.constants(), "triton")
        spikes.backward(g)
        results.append((spikes.detach(), leaf.grad, neuron.w.grad if mode == "plif" else torch.zeros(())))
    (spikes, gx, gw), (spikes2, gx2, gw2) = results
    assert torch.equal(spikes, spikes2)
    for expected, actual, allowed in ((gx, gx2, tolerance), (gw, gw2, 10 * tolerance)):
        difference = float(
            (expected.double() - actual.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300)
        )
        assert difference <= allowed, (mode, x.dtype, x.shape, difference)


if __name__ == "__main__":
    main()
