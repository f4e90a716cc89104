"""SpikingJelly's CuPy neurons without a CUDA device: up to the launch of a kernel, and their sources compiled."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import cuda_utils
from spikingjelly.activation_based.auto_cuda import base, neuron_kernel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from module import accelerate as acceleration
from module.kernels import backends
from module.kernels.backends import why_not
from module.kernels.lif import lif
from module.neuron import make_neuron


class Array:
    """What SpikingJelly asks of a CuPy array."""

    flags = types.MappingProxyType({"C_CONTIGUOUS": True})
    device = types.SimpleNamespace(id=-1)

    def __init__(self, value, dtype=None):
        self.array = np.asarray(value, dtype=dtype)
        self.dtype, self.ndim, self.shape, self.size = (
            getattr(self.array, name) for name in ("dtype", "ndim", "shape", "size")
        )


@pytest.fixture
def sources(monkeypatch):
    """Name -> source of each kernel that was launched; the launch itself does nothing."""
    launched: dict[str, str] = {}

    def raw_kernel(code, name, **_):
        return lambda *_: launched.update({f"{name} {len(launched)}": code})

    stub = types.SimpleNamespace(
        ndarray=Array, asarray=Array, RawKernel=raw_kernel, ascontiguousarray=lambda array: array
    )
    for module in (base, neuron_kernel, cuda_utils):
        monkeypatch.setattr(module, "cupy", stub)
    monkeypatch.setattr(cuda_utils, "DeviceEnvironment", lambda device: contextlib.nullcontext())
    return launched


def run(mode, dtype=torch.float32, training=True):
    node = make_neuron(mode, neuron_dtype="input").train(training)
    node.backend = "cupy"
    x = torch.randn(4, 2, 4, dtype=dtype, requires_grad=training)
    spikes = node(x)
    if training:
        spikes.backward(torch.ones_like(spikes))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["lif", "plif"])
def test_spikingjellys_cupy_neurons_reach_the_launch(mode, training, sources):
    """Without `np.int`, which NumPy no longer has, they do not."""
    run(mode, training=training)
    # In evaluation SpikingJelly computes LIF by torch, whatever the backend.
    assert len(sources) == (2 if training else mode == "plif")


def test_numpy_itself_stays_as_it_is():
    assert not hasattr(np, "int")


def test_what_breaks_in_spikingjelly_is_the_reason(sources, monkeypatch):
    monkeypatch.setattr(base, "np", np)
    reason = backends.why_cupy_nodes_fail(torch.device("cpu"))
    assert "running SpikingJelly's LIF on cupy failed: AttributeError: module 'numpy' has no attribute 'int'" in reason


def test_kernels_that_compute_nothing_are_found(sources):
    assert "computes something else on CuPy" in backends.why_cupy_nodes_fail(torch.device("cpu"))


@pytest.mark.parametrize(
    ("cannot_run", "wrong", "expected"),
    [
        ((), (), "triton kernel"),
        (("triton",), (), "SpikingJelly's CuPy kernel"),
        ((), ("triton",), "SpikingJelly's CuPy kernel"),
        (("cupy",), ("triton",), "SpikingJelly's torch code"),
        (("triton",), ("cupy",), "SpikingJelly's torch code"),
    ],
    ids=str,
)
def test_auto_on_cuda_takes_the_next_backend_and_says_why(cannot_run, wrong, expected, monkeypatch, caplog):
    def proof(candidate, contexts, steps):
        return "it is wrong" if candidate.settings.get("kernel", "cupy") in wrong else None

    monkeypatch.setattr(backends, "why_not", lambda backend, device: "no driver" if backend in cannot_run else None)
    monkeypatch.setattr(acceleration, "_why_not", proof)
    with FakeTensorMode(), torch.device("cuda"), caplog.at_level(logging.WARNING, "sdt"):
        model = acceleration.accelerate(nn.Sequential(make_neuron("plif"), make_neuron("lif")))
    assert {row.runs_as for row in acceleration.rows(model)} == {expected}
    for backend in cannot_run:
        assert f"neurons do not run on {backend}: no driver" in caplog.text
    for backend in wrong:
        assert f"neurons do not run on {backend}: it is wrong" in caplog.text


def test_triton_refuses_a_tensor_that_is_not_on_cuda():
    with pytest.raises(ValueError, match="'triton' runs on CUDA devices, and its input is on cpu"):
        lif(torch.randn(2, 3), torch.tensor(0.5), 2, 1.0, 4.0, "triton")
    assert why_not("triton", torch.device("cpu")) == "the model is on cpu, not on a CUDA device"


def library() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((f for folder in folders for f in Path(folder).glob("**/libnvrtc.so.*")), None)


@pytest.mark.skipif(library() is None, reason="no NVRTC; it comes with torch's CUDA wheels")
@pytest.mark.parametrize("architecture", [80, 90])
def test_spikingjellys_kernels_compile(architecture, sources):
    for mode in ("lif", "plif"):
        for dtype in (torch.float32, torch.float16):
            run(mode, dtype)
    assert len(sources) == 8
    nvrtc = ctypes.CDLL(str(library()))
    cupy = importlib.util.find_spec("cupy")
    folders = list(cupy.submodule_search_locations or []) if cupy else []
    includes = [library().parents[1] / "include", *(Path(folder) / "_core/include" for folder in folders)]
    options = [f"-arch=sm_{architecture}", "--device-as-default-execution-space", *(f"-I{path}" for path in includes)]
    for name, code in sources.items():
        program = ctypes.c_void_p()
        assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None) == 0
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert not failed, f"{name}: {log.value.decode()}"
        assert re.search(r"extern \"C\" __global__", code)
