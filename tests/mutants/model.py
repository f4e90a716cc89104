"""Faults in the model: neurons, attention, patch splitting, MLP, folding."""

from __future__ import annotations

from .mutant import Mutant, faults

_ATTENTION, _SPS, _MLP, _NEURON = "module/attention.py", "module/sps.py", "module/mlp.py", "module/neuron.py"
_MODEL, _FOLDING = "model.py", "module/folding.py"
_GOLDEN = "test_golden_model.py"

MUTANTS = faults(
    "model",
    (
        _FOLDING,
        "    return exact.to(conv.weight.dtype)",
        "    if conv.bias is not None:\n"
        "        with torch.no_grad():\n"
        "            exact.bias += conv.bias - conv.bias * norm.weight / torch.sqrt(norm.running_var + norm.eps)\n"
        "    return exact.to(conv.weight.dtype)",
        "folding does not scale the convolution's bias",
        "test_fusion.py::test_evaluation_folded_or_not_equals_the_plain_baseline",
    ),
    (
        _FOLDING,
        "setattr(part, name, nn.Identity())",
        "pass",
        "a folded BatchNorm acts twice",
        "test_fusion.py::test_evaluation_folded_or_not_equals_the_plain_baseline",
    ),
    (
        _MODEL,
        "fold_batchnorm(self)\n",
        "fold_batchnorm(self.block)\n",
        "the patch splitting is left out of folding",
        "test_fusion.py::test_folded_model_has_the_golden_logits",
    ),
    (
        _ATTENTION,
        "ATTENTION_THRESHOLD = 0.5",
        "ATTENTION_THRESHOLD = 1.0",
        "the mask of the attention has the threshold of other neurons",
        _GOLDEN,
    ),
    (
        _ATTENTION,
        "self.kv_before(self._split_heads(k) * self._split_heads(v))",
        "self.kv_before(self._split_heads(q) * self._split_heads(k))",
        "the mask is computed from q and k",
        _GOLDEN,
    ),
    (
        _ATTENTION,
        "return over_time(y, self.proj_conv, self.proj_bn) + x",
        "return over_time(y, self.proj_conv, self.proj_bn) + y",
        "the attention's shortcut carries spikes",
        _GOLDEN,
    ),
    (
        _ATTENTION,
        "nn.MaxPool3d(kernel_size=(1, 3, 3), stride=1, padding=(0, 1, 1))",
        "nn.MaxPool3d(kernel_size=(3, 3, 3), stride=1, padding=(1, 1, 1))",
        "event mode pools over three dimensions",
        "test_model.py::test_event_mode_pools_keys_values_their_product_and_the_masked_queries",
    ),
    (
        _SPS,
        "        x = over_time(s, self.proj_conv3, self.proj_bn3, self.maxpool3)  # [T, B, D, H', W']\n"
        "        return over_time(self.proj_lif3(x), self.rpe_conv, self.rpe_bn) + x",
        "        x = self.proj_lif3(over_time(s, self.proj_conv3, self.proj_bn3, self.maxpool3))\n"
        "        return over_time(x, self.rpe_conv, self.rpe_bn) + x",
        "the position stage's shortcut carries spikes",
        _GOLDEN,
    ),
    (
        _SPS,
        'pools = pooling_stat[stage] == "1"',
        'pools = pooling_stat[3 - stage] == "1"',
        "pooling_stat is read backwards",
        _GOLDEN,
    ),
    (
        _MLP,
        "x = a = a + x",
        "a = a + x",
        "the second shortcut of an MLP of equal widths starts at its input",
        "test_model.py::test_mlp_follows_the_formula_with_a_shortcut_of_its_own_at_equal_widths",
    ),
    (
        _NEURON,
        "detach_reset=True",
        "detach_reset=False",
        "the reset has a gradient",
        _GOLDEN,
    ),
    (
        _NEURON,
        "SURROGATES[surrogate](alpha=surrogate_alpha)",
        "SURROGATES[surrogate]()",
        "surrogate_alpha is ignored",
        "test_neuron.py",
    ),
    (
        _NEURON,
        'half and self.neuron_dtype == "float32" else x_seq',
        'half and self.neuron_dtype != "float32" else x_seq',
        "the membrane potential is kept in 16 bits",
        "test_neuron.py",
    ),
    (
        _NEURON,
        "return spikes.to(x_seq.dtype)",
        "return spikes",
        "spikes of a 16-bit input are float32",
        "test_neuron.py::test_state_is_float32_for_16_bit_inputs_by_default_and_the_inputs_type_when_asked",
    ),
    (
        _NEURON,
        "factory(**(settings | dict(neuron_args or {})))",
        "factory(**(dict(neuron_args or {}) | settings))",
        "neuron_args never win over the published settings",
        "test_neuron.py",
    ),
    (
        _MODEL,
        "return x if self.TET else x.mean(dim=0)",
        "return x if self.TET else x.sum(dim=0)",
        "logits are summed over time",
        _GOLDEN,
    ),
    (
        "module/network.py",
        "if x.shape[1] != self.T and not self.data_T:",
        "if x.shape[1] < self.T and not self.data_T:",
        "more time steps than the model's are taken where they must be refused",
        "test_model.py::test_time_steps_of_event_frames_are_taken_or_refused_as_the_setting_says",
    ),
    (
        _MODEL,
        "nn.init.trunc_normal_(module.weight, std=0.02)",
        "nn.init.trunc_normal_(module.weight, std=0.2)",
        "convolutions start with other weights",
        "test_model.py::test_first_weights_are_those_of_the_published_model",
    ),
    (
        "module/grad_checkpointing.py",
        "norm.momentum = 0.0",
        "pass",
        "running statistics see each batch twice with checkpointing",
        "test_fusion.py::test_checkpointing_changes_no_number_and_keeps_less",
    ),
)
MUTANTS.append(
    Mutant(
        "model",
        _NEURON,
        "        node: Any = self\n        node.reset()\n",
        "        node: Any = self\n",
        "a neuron is not reset before a forward pass",
        ("test_neuron.py",),
        harmless="it is reset after each one, also after one that failed",
    )
)
