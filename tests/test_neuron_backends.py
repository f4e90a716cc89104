"""Every neuron backend computes what SpikingJelly's torch neuron computes: spikes, gradients, learnable tau."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import neuron_on
from torch import Tensor

from module.accelerate import accelerate
from module.kernels import cpu as cpu_kernels
from module.kernels import lif as neuron_ops
from module.kernels.backends import fastest_first, why_not
from module.neuron import make_neuron

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("cpp", "triton", "lean")
# Largest difference of a gradient, relative to the largest one: the order of a few roundings in float64 and float32;
# in bfloat16, that of its 8 bits once more where an intermediate value rounds the other way.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = {
    "odd": (4, 3, 5, 7, 3),
    "one step": (1, 2, 3, 4, 4),
    "long": (11, 2, 3, 5, 5),
    "one element": (2, 1, 1, 1, 1),
    "several blocks": (3, 5, 37, 9, 2),
}


def run(mode: str, backend: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, gradient of the input, gradient of the learnable time constant."""
    # A decay of 1/4, which has no rounding: with that of tau = 2 it could be taken for 1 - decay.
    tau = {"tau": 4.0} if mode == "lif" else {"init_tau": 4.0}
    neuron = neuron_on(backend, mode, v_threshold=0.7, neuron_args=tau)
    if x.dtype == torch.float64:
        neuron = neuron.double()
    x = x.detach().requires_grad_()
    spikes = neuron(x)
    spikes.backward(g)
    assert x.grad is not None
    return spikes.detach(), x.grad, neuron.w.grad if mode == "plif" else torch.zeros(())


def needs(backend: str) -> None:
    if backend == "cpp" and cpu_kernels.why_unusable():
        pytest.skip(cpu_kernels.why_unusable())
    if backend == "triton" and (reason := why_not("triton", torch.device("cuda"))):
        pytest.skip(f"{reason}; in Triton's interpreter: see the test of that name")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    scale = expected.double().abs().max().clamp_min(1e-300)
    difference = float((actual.double() - expected.double()).abs().max() / scale)
    assert difference <= tolerance, f"{what}: {difference}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", ["lif", "plif"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_backend_equals_spikingjelly(backend, shape, mode, dtype):
    needs(backend)
    random = torch.Generator().manual_seed(1)
    x = (2 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
    g = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    expected = run(mode, "torch", x, g)
    actual = run(mode, backend, x, g)
    assert actual[0].dtype == dtype
    assert torch.equal(actual[0], expected[0])
    assert_close(actual[1], expected[1], TOLERANCE[dtype], "gradient of the input")
    # In 16 bits SpikingJelly's gradient is summed from values rounded otherwise.
    assert_close(actual[2], expected[2], 10 * TOLERANCE[dtype], "gradient of w")


@pytest.mark.parametrize("backend", ["cpp", "lean"])
@pytest.mark.parametrize("layout", ["channels last", "transposed", "gaps", "expanded"])
def test_any_layout_gives_the_same_spikes_and_gradients(backend, layout):
    needs(backend)
    x = 2 * torch.randn(3, 4, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g = torch.randn_like(x)
    laid_out = {
        "channels last": lambda: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 4)),
        "transposed": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps": lambda: torch.stack([x, x], dim=-1)[..., 0],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1, -1),
    }[layout]()
    expected = run("plif", "torch", laid_out.contiguous(), g)
    for gradient in (g, laid_out.new_empty(laid_out.shape).copy_(g), g.transpose(3, 4).contiguous().transpose(3, 4)):
        actual = run("plif", backend, laid_out, gradient)
        assert torch.equal(actual[0], expected[0])
        assert_close(actual[1], expected[1], 1e-13, "gradient of the input")
        assert_close(actual[2], expected[2], 1e-12, "gradient of w")


def test_channels_last_input_is_not_copied():
    x = torch.randn(8, 6, 5, 5).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    assert neuron_ops.dense(x) is x
    assert neuron_on("cpp")(x).stride() == x.stride()


@pytest.mark.parametrize("kernel", ["cpp", "lean"])
@pytest.mark.parametrize("steps", [3, 1])
def test_same_input_at_each_step_equals_its_copies(kernel, steps):
    needs(kernel)
    x = 2 * torch.randn(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    decay = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    once, copies = x.clone().requires_grad_(), x.expand(steps, -1, -1, -1).clone().requires_grad_()
    g = torch.randn(steps, 4, 3, 5, dtype=torch.float64)
    a = neuron_ops.lif(once, decay, steps, 1.0, 4.0, kernel)
    (g_once, g_decay) = torch.autograd.grad(a, [once, decay], g)
    b = neuron_ops.lif(copies, decay, steps, 1.0, 4.0, kernel)
    (g_copies, g_decay_copies) = torch.autograd.grad(b, [copies, decay], g)
    assert torch.equal(a, b)
    assert_close(g_once, g_copies.sum(0, keepdim=True), 1e-13, "gradient of the input")
    assert_close(g_decay, g_decay_copies, 1e-12, "gradient of the decay")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the checks themselves
@pytest.mark.parametrize("kernel", ["cpp", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_checks_of_torch_pass(kernel, dtype):
    needs(kernel)
    x = torch.randn(3, 2, 4, 5, dtype=dtype, requires_grad=True)
    decay = torch.tensor(0.5, requires_grad=True)
    torch.library.opcheck(neuron_ops.lif, (x, decay, 3, 1.0, 4.0, kernel))
    torch.library.opcheck(neuron_ops.lif, (x[:1].detach().requires_grad_(), decay, 3, 1.0, 4.0, kernel))


def test_the_backward_pass_keeps_one_tensor():
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(4, 2, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        neuron_on("lean", "plif")(x)
    assert sum(kept) <= x.numel() + 2  # the input, and the scalar in two forms


def test_a_kernel_gives_the_same_bits_each_time_and_for_any_number_of_threads():
    needs("cpp")
    x, g = torch.randn(4, 8, 16, 8, 8), torch.randn(4, 8, 16, 8, 8)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(run("plif", "cpp", x, g))
    finally:
        torch.set_num_threads(before)
    for spikes, gradient, _ in runs:
        assert torch.equal(spikes, runs[0][0])
        assert torch.equal(gradient, runs[0][1])
    assert torch.equal(runs[2][2], runs[3][2])  # a sum depends on how it is split, not on who is first


def test_torch_compile_sees_no_graph_break_in_neurons():
    torch._dynamo.reset()
    for mode in ("lif", "plif"):
        neuron = neuron_on("lean", mode)
        x = torch.randn(3, 2, 4, 5, 5)
        compiled = torch.compile(neuron, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), neuron(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "words"), [("triton", "the model is on cpu, not on a CUDA device"), ("cupy", "not on a CUDA device")]
)
def test_a_backend_that_cannot_run_says_why(backend, words):
    with pytest.raises(ValueError, match=rf"backend '{backend}' cannot be used: .*{words}.* Use 'auto' or 'torch'"):
        accelerate(make_neuron(), neuron_backend=backend)


def test_auto_takes_the_fastest_kernel_of_the_device():
    """As measured: benchmarks/RESULTS.md."""
    found = {kind: fastest_first(torch.device(kind)) for kind in ("cpu", "cuda", "meta")}
    assert found == {"cpu": ("cpp", "lean"), "cuda": ("triton", "cupy", "torch"), "meta": ("lean",)}
    if cpu_kernels.why_unusable() is None:
        assert accelerate(make_neuron()).kernel == "cpp"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="neuron_backend='numpy' is not one of auto, torch, cupy, cpp, triton, lean"):
        accelerate(make_neuron(), neuron_backend="numpy")


@pytest.mark.parametrize("change", [dict(v_reset=0.1), dict(decay_input=False), dict(detach_reset=False)], ids=str)
def test_a_neuron_whose_settings_change_leaves_the_kernel(change):
    neuron, plain = neuron_on("lean"), make_neuron()
    x = 2 * torch.rand(3, 2, 5) + 0.5
    for module in (neuron, plain):
        vars(module).update(change)
    assert torch.equal(neuron(x), plain(x))
    assert not torch.equal(make_neuron()(x.requires_grad_()), torch.zeros_like(x))
    neuron.fast_forward = lambda x: pytest.fail("the kernel ran")
    neuron(x)


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter_equal_float64():
    pytest.importorskip("triton")
    # Triton reads the variable when a kernel is defined, so this needs a process of its own.
    script = ROOT / "tests" / "triton_interpreter.py"
    environment = {
        "TRITON_INTERPRET": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{script.parent}",
        "HOME": str(Path.home()),
    }
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout
