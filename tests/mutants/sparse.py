"""Faults in the sparse engine: its choice, its counts, its numbers."""

from __future__ import annotations

from .mutant import faults

_CONV, _OPS, _CROSSOVER = "module/sparse/conv.py", "module/sparse/ops.py", "module/sparse/crossover.py"
_NETWORK, _PROGRAM, _INFERENCE = "module/sparse/network.py", "module/sparse/program.py", "module/sparse/inference.py"
_FORWARD, _LISTS, _TABLES = (f"module/kernels/csrc/sparse/{name}.c" for name in ("forward", "lists", "tables"))

MUTANTS = faults(
    "sparse",
    (
        _CROSSOVER,
        "_RATES[0] + (dense - at_few) / slope",
        "_RATES[0] - (dense - at_few) / slope",
        "the crossover has the wrong sign",
        "test_sparse_ops.py::TestCrossover",
    ),
    (
        _CROSSOVER,
        " / (_RATES[1] - _RATES[0])",
        "",
        "the slope of the crossover is that of another distance",
        "test_sparse_ops.py::TestCrossover",
    ),
    (
        _CROSSOVER,
        "return min(1.0, max(0.0,",
        "return max(1.0, min(0.0,",
        "every layer is sparse at any rate",
        "test_sparse_ops.py::TestCrossover",
    ),
    (
        _OPS,
        "if count > limit * x.numel():",
        "if count < limit * x.numel():",
        "layers are dense below the crossover and sparse above it",
        "test_sparse_ops.py::test_auto_is_dense_above_the_crossover_and_event_driven_below",
    ),
    (
        _TABLES,
        "4 * g + k < count ?",
        "4 * g + k <= count ?",
        "a table has the weights of the next kernel position",
        "test_sparse_ops.py::test_lists_and_tables_give_the_same_spikes_and_count_the_same_additions",
    ),
    (
        _LISTS,
        "first + chunk < all ? first + chunk : all",
        "first + chunk",
        "a list goes on behind the last word",
        "test_sparse_ops.py::test_lists_and_tables_give_the_same_spikes_and_count_the_same_additions",
    ),
    (
        _CONV,
        "            self.counts = counts",
        "            self.counts = counts if self.counts is None else self.counts + counts",
        "a layer's counts are of all calls",
        "test_sparse_engine.py::test_additions_of_layers_are_those_of_the_last_call_and_of_the_inference_all",
    ),
    (
        _PROGRAM,
        "self.weights[name].additions += done",
        "self.weights[name].additions = done",
        "the additions of an evaluation are those of its last batch",
        "test_sparse_engine.py::test_additions_of_layers_are_those_of_the_last_call_and_of_the_inference_all",
    ),
    (
        _CONV,
        'out_dtype = autocast_dtype("cpu") or (',
        "out_dtype = (",
        "a layer is float32 under autocast",
        "test_sparse_engine.py::test_a_layer_gives_the_dtype_of_autocast_whatever_its_spikes_are_stored_as",
    ),
    (
        _CONV,
        "auto=self.auto, bf16_input_grad=self.bf16_input_grad\n",
        "auto=self.auto\n",
        "bf16_input_grad is lost in the layer",
        "test_sparse_engine.py::test_gradients_of_spikes_are_bfloat16_where_that_is_asked_for",
    ),
    (
        _OPS,
        "dtype = torch.bfloat16 if ctx.bf16_input_grad else grad.dtype",
        "dtype = grad.dtype",
        "bf16_input_grad is lost in the backward pass",
        "test_sparse_ops.py::test_bfloat16_input_gradient_changes_no_other_gradient",
    ),
    (
        "utils/run/build.py",
        "            bf16_input_grad=cfg.bf16_input_grad,\n",
        "",
        "the setting bf16_input_grad does nothing",
        "test_trainer.py::test_settings_of_the_engine_reach_its_layers",
    ),
    (
        "module/accelerate.py",
        '{"auto": engine == "auto",',
        '{"auto": engine != "auto",',
        "engine sparse is auto, and auto is sparse",
        "test_trainer.py::test_settings_of_the_engine_reach_its_layers",
    ),
    (
        _PROGRAM,
        'hasattr(node, "w") else 1.0 / node.tau',
        'hasattr(node, "w") else 0.5',
        "the evaluation on bits knows tau = 2 only",
        "test_sparse_engine.py::test_inference_on_bits_equals_the_model",
    ),
    (
        _NETWORK,
        "neuron=then, residual=u)",
        "neuron=then)",
        "the evaluation on bits loses its shortcuts",
        "test_sparse_engine.py::test_inference_on_bits_equals_the_model",
    ),
    (
        _INFERENCE,
        "layer.v_reset != 0 or ",
        "",
        "a soft reset is computed as a hard one",
        "test_sparse_engine.py::test_neurons_of_other_kinds_are_not_computed_on_bits",
    ),
    (
        _INFERENCE,
        "parameter.dtype != torch.float32:",
        "parameter.dtype == torch.bfloat16:",
        "a float64 network is evaluated in float32",
        "test_sparse_engine.py::test_neurons_of_other_kinds_are_not_computed_on_bits",
    ),
    (
        _OPS,
        "grad_bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32)",
        "grad_bias = grad.mean(dim=(0, 2, 3), dtype=torch.float32)",
        "the gradient of a bias is a mean",
        "test_sparse_ops.py::test_gradients_equal_dense",
    ),
)
