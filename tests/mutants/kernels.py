"""Faults in the faster ways: compiled kernels, Triton's, what chooses and proves them."""

from __future__ import annotations

from .mutant import faults

_TRITON_LIF, _COMMON = "module/kernels/triton_lif.py", "module/kernels/triton_common.py"
_LEAN, _LIF, _BACKENDS = "module/kernels/lif_torch.py", "module/kernels/lif.py", "module/kernels/backends.py"
_NORM, _ACCELERATE, _CPP = "module/kernels/batchnorm.py", "module/accelerate.py", "module/kernels/csrc/neuron.cpp"
_INTERPRETER = "test_neuron_backends.py::test_triton_kernels_in_the_interpreter_equal_float64"
_EQUAL = "test_neuron_backends.py::test_backend_equals_spikingjelly"

MUTANTS = faults(
    "kernels",
    (
        _TRITON_LIF,
        "g_in = g_h * d\n        g_v = g_h - g_in\n        if WANT_DECAY:",
        "g_in = g_h * (1.0 - d)\n        g_v = g_h - g_in\n        if WANT_DECAY:",
        "Triton's backward pass takes the decay for 1 - decay",
        _INTERPRETER,
    ),
    (
        _COMMON,
        "return v + (current - v) * decay",
        "return current + (v - current) * decay",
        "Triton's neuron takes the decay for 1 - decay",
        _INTERPRETER,
    ),
    (
        _COMMON,
        "return alpha * e / ((1.0 + e) * (1.0 + e))",
        "return e / ((1.0 + e) * (1.0 + e))",
        "Triton's surrogate loses its slope",
        _INTERPRETER,
    ),
    (
        _TRITON_LIF,
        "fires = h >= THRESHOLD\n",
        "fires = h > THRESHOLD\n",
        "Triton's neuron does not fire at the threshold itself",
        _INTERPRETER,
    ),
    (
        _BACKENDS,
        '"cuda": ("triton", "cupy", "torch")',
        '"cuda": ("torch", "triton", "cupy")',
        "auto takes the slow neurons on CUDA",
        "test_neuron_backends.py::test_auto_takes_the_fastest_kernel_of_the_device",
    ),
    (
        _LEAN,
        "g_v.masked_fill_(h >= threshold, 0.0)",
        "g_v",
        "the lean kernel has a gradient through the reset",
        _EQUAL,
    ),
    (
        _LEAN,
        "return current * decay if v is None",
        "return current if v is None",
        "the first step of the lean kernel is not charged with the decay",
        _EQUAL,
    ),
    (
        _LEAN,
        "g_decay += (g_h * driven).sum()",
        "g_decay = (g_h * driven).sum()",
        "the gradient of the time constant is that of the first step alone",
        _EQUAL,
    ),
    (
        _CPP,
        "gv[i] = gh - gin;",
        "gv[i] = gh;",
        "the compiled neuron's gradient through time ignores the leak",
        _EQUAL,
    ),
    (
        _CPP,
        "total[i] += gin;",
        "total[i] = gin;",
        "the gradient of a static image is that of one step",
        "test_neuron_backends.py::test_same_input_at_each_step_equals_its_copies",
    ),
    (
        _LIF,
        "return x.shape[0] == 1 or x.stride(0) * x.shape[0] == x.numel()",
        "return True",
        "a tensor with time not outermost is taken for dense",
        "test_neuron_backends.py::test_any_layout_gives_the_same_spikes_and_gradients",
    ),
    (
        _NORM,
        "return scale, bias.double() - mean.double() * scale",
        "return scale, bias.double() - mean.double()",
        "fused BatchNorm shifts by the mean without its scale",
        "test_fusion.py::test_training_step_equals_the_plain_baseline",
    ),
    (
        "module/kernels/pool.py",
        "x.is_contiguous(memory_format=torch.channels_last)",
        "x.is_contiguous()",
        "the fused pool reads a layout that it does not know",
        "test_pool_ops.py",
    ),
    (
        _ACCELERATE,
        "if answers[name] is None:\n",
        "if True:\n",
        "kernels are attached although they differ",
        "test_accelerate.py",
    ),
    (
        _ACCELERATE,
        "    answers = {kind: _edited(c) or (",
        "    answers = {kind: (",
        "kernels replace an edited method where they are not proved",
        "test_accelerate.py",
    ),
    (
        _ACCELERATE,
        "modes = (True, False) if training else (False,)",
        "modes = (False,)",
        "kernels are proved in evaluation only",
        "test_accelerate.py",
    ),
    (
        "module/kernels/winograd.py",
        "kernels = (_kernel_transform().flip(1) @",
        "kernels = (_kernel_transform() @",
        "the gradient by Winograd's algorithm forgets to flip the kernel",
        "test_winograd.py::test_gradients_are_those_of_the_direct_sums",
    ),
    (
        "module/kernels/winograd.py",
        "sums.baddbmm_(gradients.transpose(1, 2), inputs)",
        "torch.bmm(gradients.transpose(1, 2), inputs, out=sums)",
        "the weight gradient by Winograd's algorithm is that of the last chunk alone",
        "test_winograd.py::test_chunks_of_tiles_join_to_the_whole",
    ),
)
