"""The neurons: dynamics against hand-computed traces, state for one forward only, precision, backends."""

from __future__ import annotations

import copy
import importlib
import math
import sys

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

from module import neuron as neuron_file
from module.kernels.backends import why_cupy_cannot_be_used
from module.neuron import make_neuron

MODES = ("lif", "plif")


@pytest.fixture
def fresh_cupy_verdict():
    """The verdict is cached for the process: forget it before and after a test that simulates another machine."""
    why_cupy_cannot_be_used.cache_clear()
    yield
    why_cupy_cannot_be_used.cache_clear()


def over_time(*values):
    """One neuron's current over time, `[T, 1, 1]`, in float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def trace(neuron, x):
    """Spikes and membrane potentials after the reset, as plain lists."""
    neuron.store_v_seq = True
    spikes = neuron(x)
    return spikes.flatten().tolist(), neuron.v_seq.flatten().tolist()


@pytest.mark.parametrize("training", [True, False])
def test_lif_follows_the_membrane_trace_computed_by_hand(training):
    # H[t] = V[t-1] + (X[t] - V[t-1]) / 2, fires at H >= 1, then V = 0:
    # t  X     V[t-1]  H      fires  V
    # 1  1.0   0       0.5    no     0.5
    # 2  1.5   0.5     1.0    yes    0      the threshold hit exactly
    # 3  1.0   0       0.5    no     0.5
    # 4  -0.5  0.5     0      no     0
    # 5  1.75  0       0.875  no     0.875
    # 6  2.0   0.875   1.4375 yes    0      a hard reset: nothing of the surplus stays
    # 7  0.5   0       0.25   no     0.25
    neuron = make_neuron("lif").train(training)
    spikes, potentials = trace(neuron, over_time(1.0, 1.5, 1.0, -0.5, 1.75, 2.0, 0.5))
    assert spikes == [0, 1, 0, 0, 0, 1, 0]
    assert potentials == [0.5, 0.0, 0.5, 0.0, 0.875, 0.0, 0.25]


@pytest.mark.parametrize("training", [True, False])
def test_lif_fires_at_the_threshold_and_not_below_it(training):
    neuron = make_neuron("lif", v_threshold=0.5).train(training)
    below = math.nextafter(1.0, 0.0)
    assert neuron(over_time(1.0)).item() == 1
    assert neuron(over_time(below)).item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_parametric_lif_starts_as_lif_and_follows_its_own_time_constant(training):
    neuron = make_neuron("plif").double().train(training)
    assert [name for name, _ in neuron.named_parameters()] == ["w"]
    assert torch.sigmoid(neuron.w).item() == 0.5
    with torch.no_grad():
        neuron.w.fill_(math.log(1 / 3))  # 1/tau = sigmoid(w) = 1/4
    # H[t] = V[t-1] + (X[t] - V[t-1]) / 4: 0.5; 0.875; then 0.875 + (1.5 - 0.875) / 4 = 1.03125 fires; then 0.25
    spikes, potentials = trace(neuron, over_time(2.0, 2.0, 1.5, 1.0))
    assert spikes == [0, 0, 1, 0]
    assert potentials == pytest.approx([0.5, 0.875, 0.0, 0.25], abs=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_surrogate_gradient_is_that_of_the_formula(mode):
    # One step from V = 0: H = X / 2 and dS/dX = 4 s (1 - s) / 2 with s = sigmoid(4 (H - 1)).
    x = torch.linspace(-1.0, 4.0, 11, dtype=torch.float64).reshape(1, 1, -1).requires_grad_()
    make_neuron(mode).double()(x).sum().backward()
    s = torch.sigmoid(4.0 * (x.detach() / 2 - 1.0))
    torch.testing.assert_close(x.grad, 4.0 * s * (1 - s) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [1.5, 8.0])
def test_surrogate_alpha_is_its_steepness(alpha):
    x = torch.linspace(-1.0, 4.0, 11, dtype=torch.float64).reshape(1, 1, -1).requires_grad_()
    make_neuron("lif", surrogate_alpha=alpha)(x).sum().backward()
    s = torch.sigmoid(alpha * (x.detach() / 2 - 1.0))
    torch.testing.assert_close(x.grad, alpha * s * (1 - s) / 2, rtol=1e-12, atol=0)


def test_arguments_of_the_neuron_win_over_the_published_settings():
    neuron = make_neuron("lif", neuron_args={"tau": 3.0, "v_threshold": 0.3, "v_reset": -0.2, "detach_reset": False})
    assert (neuron.tau, neuron.v_threshold, neuron.v_reset, neuron.detach_reset) == (3.0, 0.3, -0.2, False)
    published = make_neuron("lif", v_threshold=0.8)
    found = (published.tau, published.v_threshold, published.v_reset, published.detach_reset)
    assert found == (2.0, 0.8, 0.0, True)


def test_surrogate_gradient_through_time_treats_the_reset_as_constant():
    # Two steps: H1 = X1/2, V1 = H1 (1 - S1) with S1 constant, H2 = V1/2 + X2/2.
    x = over_time(1.5, 1.2).requires_grad_()  # H1 = 0.75, silent; H2 = 0.975
    make_neuron("lif")(x)[1].sum().backward()
    s = 1 / (1 + math.exp(-4.0 * (0.975 - 1.0)))
    slope = 4.0 * s * (1 - s)
    assert x.grad.flatten().tolist() == pytest.approx([slope * 0.5 * 0.5, slope * 0.5], rel=1e-12)

    x = over_time(2.5, 1.2).requires_grad_()  # H1 = 1.25 fires: nothing of X1 reaches the second step
    make_neuron("lif")(x)[1].sum().backward()
    assert x.grad[0].item() == 0


@pytest.mark.parametrize("mode", MODES)
def test_parametric_time_constant_gets_a_gradient_only_where_there_is_one(mode):
    neuron = make_neuron(mode)
    neuron(torch.randn(3, 2, 4, requires_grad=True)).sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in neuron.parameters())
    assert len(list(neuron.parameters())) == (mode == "plif")


@pytest.mark.parametrize("mode", MODES)
def test_no_state_leaks_between_forwards_of_different_batches_and_modes(mode):
    x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    expected = make_neuron(mode).double()(x)
    neuron = make_neuron(mode).double()
    for before in (torch.ones(4, 2, 3), torch.ones(2, 7, 9)):
        neuron.train()
        neuron(before.double().requires_grad_())
        torch.testing.assert_close(neuron(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(neuron.eval()(x), expected, rtol=0, atol=0)
    functional.reset_net(neuron)
    torch.testing.assert_close(neuron(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_deepcopy_works_after_a_training_forward_and_computes_the_same(mode):
    neuron = make_neuron(mode)
    neuron.store_v_seq = True
    x = torch.randn(3, 2, 4, requires_grad=True)
    spikes = neuron(x)
    twin = copy.deepcopy(neuron)
    torch.testing.assert_close(twin(x), spikes)


def test_state_is_dropped_when_a_forward_fails():
    neuron = make_neuron("lif")
    neuron.surrogate_function = _Spoilt()
    with pytest.raises(TypeError, match="spoilt"):
        neuron(torch.ones(2, 1, 1, requires_grad=True))
    assert neuron.v == neuron.v_reset


class _Spoilt(nn.Module):
    def forward(self, x):
        raise TypeError("spoilt")


@pytest.mark.parametrize("training", [True, False])
def test_stored_potentials_have_one_entry_per_step_and_hold_no_graph(training):
    neuron = make_neuron("lif").train(training)
    neuron.store_v_seq = True
    neuron(torch.randn(5, 2, 3, requires_grad=True))
    assert neuron.v_seq.shape == (5, 2, 3)
    assert not neuron.v_seq.requires_grad


def test_first_axis_is_time_and_samples_know_nothing_of_each_other():
    x = 2 * torch.rand(6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    neuron = make_neuron("lif")
    together = neuron(x)
    assert 0 < together.mean() < 1
    for sample in range(5):
        torch.testing.assert_close(neuron(x[:, sample : sample + 1]), together[:, sample : sample + 1], rtol=0, atol=0)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(neuron(x[:, order]), together[:, order], rtol=0, atol=0)
    assert not torch.equal(neuron(x.flip(0)).flip(0), together)  # time has a direction


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_state_is_float32_for_16_bit_inputs_by_default_and_the_inputs_type_when_asked(dtype, autocast):
    x = torch.full((3, 1, 1), 0.75, dtype=dtype)
    for choice, expected in (("float32", torch.float32), ("input", dtype)):
        neuron = make_neuron("lif", neuron_dtype=choice)
        neuron.store_v_seq = True
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            spikes = neuron(x)
        assert neuron.v_seq.dtype is expected
        assert spikes.dtype is dtype


def test_float32_state_decides_firing_where_bfloat16_rounds():
    # H[n] = (1 - 2**-n) (1 + 2**-7) creeps over 1 at step 8 and not before; with bfloat16's 8 bits it does not.
    x = torch.full((8, 1, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    exact = make_neuron("lif")(x.double())
    assert exact.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(make_neuron("lif", neuron_dtype="float32")(x).double(), exact, rtol=0, atol=0)
    assert not torch.equal(make_neuron("lif", neuron_dtype="input")(x).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_spikes_are_0_or_1_in_the_inputs_type(mode, dtype):
    spikes = make_neuron(mode)(2 * torch.rand(4, 3, 5).to(dtype))
    assert spikes.dtype is dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("arguments", "bad", "valid"),
    [
        ({"spike_mode": "lief"}, "'lief'", "lif, plif"),
        ({"surrogate": "sigmod"}, "did you mean sigmoid", "atan"),
        ({"neuron_dtype": "fp16"}, "'fp16'", "float32, input"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(arguments, bad, valid):
    with pytest.raises(ValueError, match=bad) as caught:
        make_neuron(**arguments)
    assert valid in str(caught.value)


def refusing(name, error):
    """An import_module that fails for one name, as a broken installation does."""
    real = importlib.import_module

    def import_module(asked, package=None):
        if asked == name:
            raise error
        return real(asked, package)

    return import_module


@pytest.mark.usefixtures("fresh_cupy_verdict")
def test_broken_cupy_is_named_with_its_own_error(monkeypatch):
    broken = ImportError("libnvrtc.so.13: cannot open shared object file")
    monkeypatch.setattr(importlib, "import_module", refusing("cupy", broken))
    assert why_cupy_cannot_be_used() == f"importing cupy failed: ImportError: {broken}"


@pytest.mark.usefixtures("fresh_cupy_verdict")
def test_missing_tensorboard_behind_the_kernels_is_named_and_not_cupy(monkeypatch):
    # A module that SpikingJelly's kernels pull in is missing: a real import, of a package marked as absent.
    monkeypatch.setitem(sys.modules, "cupy", type(sys)("cupy"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    kernels = "spikingjelly.activation_based.cuda_utils"
    real = importlib.import_module

    def import_module(asked, package=None):
        return real("tensorboard") if asked == kernels else real(asked, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    reason = why_cupy_cannot_be_used()
    assert reason.startswith("importing SpikingJelly's CUDA kernels failed: ModuleNotFoundError")
    assert "tensorboard" in reason


@pytest.mark.usefixtures("fresh_cupy_verdict")
def test_working_imports_without_a_device_say_so(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name, package=None: None)
    monkeypatch.setattr(neuron_file.sj_neuron, "cupy", None)
    assert "restart the process" in why_cupy_cannot_be_used()
    why_cupy_cannot_be_used.cache_clear()
    monkeypatch.setattr(neuron_file.sj_neuron, "cupy", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_cupy_cannot_be_used() == "torch sees no CUDA device"
