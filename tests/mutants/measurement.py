"""Faults in the measurement: counts, energy, the proof, the report."""

from __future__ import annotations

from .mutant import faults

_ENERGY, _COUNTS, _SYNAPSES = "utils/measure/energy.py", "utils/measure/synapse_counts.py", "utils/measure/synapses.py"
_VERIFY, _FIRING, _EXTRAS = "utils/measure/verify.py", "utils/measure/firing.py", "utils/measure/energy_extras.py"
_VALUES, _TOTALS, _SPREAD = "utils/measure/spike_values.py", "utils/measure/totals.py", "utils/measure/spread.py"
_PROOF, _RULES, _ADDITIONS, _LEDGER = (
    f"utils/measure/{name}.py" for name in ("proof", "proof_rules", "additions", "ledger")
)
_MEASUREMENT, _PAPER = "utils/measure/measurement.py", "utils/measure/sdt/paper_energy.py"
_REPORT, _CELLS, _PAGE = "utils/report/report.py", "utils/report/cells.py", "utils/report/page.py"

MUTANTS = faults(
    "measurement",
    (
        _ENERGY,
        '    kind = "MAC" if layer.values.kind == "real" else "AC"',
        '    kind = "MAC" if layer.values.kind == "real" or layer.type == "sum" else "AC"',
        "the token sums of the attention are charged as MAC",
        "test_energy.py::test_attention_is_charged_for_the_spikes_that_meet",
    ),
    (
        _MEASUREMENT,
        'first_conv = "per_step" if self.events else "once"',
        'first_conv = "once"',
        "events are charged once",
        "test_firing_num.py::test_event_frames_are_charged_at_every_step",
    ),
    (
        _ENERGY,
        "layer.steps > 1 and len(set(layer.nonzero)) == 1",
        "layer.steps > 1",
        "inputs that differ at every step are charged once",
        "test_energy.py::test_the_first_conv_is_charged_per_step_or_once",
    ),
    (
        _ENERGY,
        "exact = None if layer.synops is None else sum(layer.synops) / layer.samples",
        "exact = None if layer.synops is None else sum(layer.synops) / layer.samples / layer.steps",
        "a sample costs what one of its time steps does",
        "test_energy.py::test_exact_and_formula_charge_what_entered",
    ),
    (
        _ENERGY,
        "alternative = total - rows[0].energy_pJ + once.energy_pJ",
        "alternative = total + once.energy_pJ",
        "the other treatment of the first convolution is charged on top",
        "test_energy.py::test_the_first_conv_is_charged_per_step_or_once",
    ),
    (
        _VERIFY,
        "if self.expected.get(name, 0) != self.additions.get(name, 0)]",
        "if self.expected.get(name, 0) < self.additions.get(name, 0)]",
        "the proof accepts fewer additions than were counted",
        "test_verify.py::test_the_proof_fails_on_logits_counts_values_and_operators",
    ),
    (
        _VERIFY,
        "close = difference is not None and difference <= TOLERANCE",
        "close = difference is not None",
        "the proof accepts any logits",
        "test_verify.py::test_the_proof_fails_on_logits_counts_values_and_operators",
    ),
    (
        _VERIFY,
        "again = _logits(second(x))\n",
        "again = logits\n",
        "the proof compares the logits with themselves",
        "test_verify.py::test_a_layer_that_adds_otherwise_fails_the_proof",
    ),
    (
        _ADDITIONS,
        "added = rows.new_full((b, K), N)",
        "added = rows.new_full((b, K), K)",
        "the proof counts the additions of a linear layer by its inputs",
        "test_verify.py::test_published_models_are_spike_driven",
    ),
    (
        _PROOF,
        "        elif origin.factors:\n            self.not_binary[layer] = None\n            self._fail(",
        "        elif origin.factors:\n            self.not_binary[layer] = None\n            str(",
        "the proof does not name what scales spikes",
        "test_verify.py::test_a_network_that_multiplies_is_refused_with_operator_and_place",
    ),
    (
        _RULES,
        "            if made is Made.LEARNED:\n",
        "            if made is Made.INPUT:\n",
        "the proof lets a threshold take in a learned number",
        "test_verify.py::test_a_network_that_multiplies_is_refused_with_operator_and_place",
    ),
    (
        _PROOF,
        "if step is not None and done < len(step.folds):",
        "if step is None:",
        "a BatchNorm is folded although what enters it is used elsewhere",
        "test_verify.py::test_a_network_that_multiplies_is_refused_with_operator_and_place",
    ),
    (
        _LEDGER,
        '        elif kind == "unknown" and not self.in_neuron:\n',
        '        elif kind == "unknown" and self.in_neuron:\n',
        "operators without a price are not named",
        "test_ledger.py::test_what_has_no_price_makes_the_total_incomplete_by_name",
    ),
    (
        _EXTRAS,
        "(1 / 8 if layer.is_binary else wide)",
        "(1 / 8)",
        "the bytes of an image are counted as bits",
        "test_energy.py::test_memory_of_an_image_is_counted_in_bytes",
    ),
    (
        _EXTRAS,
        'add("update", T * sum(',
        'add("update", sum(',
        "neurons are updated in one step only",
        "test_energy.py::test_extras_stay_out_of_the_total",
    ),
    (
        _FIRING,
        "return sum(self.nonzero) / (self.elements_per_step * len(self.nonzero))",
        "return self.nonzero[-1] / self.elements_per_step",
        "the mean rate is that of the last step",
        "test_firing.py::test_counts_are_those_of_a_plain_loop",
    ),
    (
        _FIRING,
        "writer.writerow([row.name, row.paper_name, t + 1, *counts, row.rate[t], row.rate[t]])",
        "writer.writerow([row.name, row.paper_name, t + 1, *counts, row.rate[-1 - t], row.rate[t]])",
        "rates of firing.csv are in reversed order",
        "test_firing.py::test_csv_has_one_line_per_tensor_and_step_with_full_precision",
    ),
    (
        _REPORT,
        '"top1_percent": accuracy.top1,',
        '"top1_percent": accuracy.top5,',
        "the report gives top-5 as top-1",
        "test_firing_num.py::test_the_report_has_the_accuracy_and_rates_of_the_model",
    ),
    (
        _CELLS,
        'rates = [*(f"{rate:.4f}" for rate in row.rate)',
        'rates = [*(f"{rate:.4f}" for rate in reversed(row.rate))',
        "the table of firing rates runs backwards",
        "test_firing.py::test_table_shows_both_names_and_every_step",
    ),
    (
        _REPORT,
        'rates = [*row.rate, *[""] * (steps - len(row.rate))]',
        'rates = [*row.rate[::-1], *[""] * (steps - len(row.rate))]',
        "the rates of layers.csv run backwards",
        "test_firing_num.py::test_tables_for_machines",
    ),
    (
        _MEASUREMENT,
        "cfg.resume, use_ema=cfg.use_ema",
        "cfg.resume",
        "the moving average is asked for and the weights are measured",
        "test_firing_num.py::test_moving_average_weights_on_request",
    ),
    (
        _VALUES,
        "        elif counts[WHOLE] == nonzero:",
        "        elif counts[WHOLE]:",
        "a layer that takes one whole number is charged as one of spikes",
        "test_synapses.py::test_one_value_of_another_kind_decides_the_kind_of_all",
    ),
    (
        _COUNTS,
        "fan_out = weight.shape[1] if geometry.transposed else weight.shape[0] // geometry.groups",
        "fan_out = weight.shape[1] if geometry.transposed else weight.shape[0]",
        "a grouped convolution is counted as a full one",
        "test_synapses.py::test_exact_counts_are_those_of_a_loop_over_spikes_and_weights",
    ),
    (
        _TOTALS,
        "places = torch.cat([torch.arange(part.shape[-1]) * len(parts) + rank",
        "places = torch.cat([torch.arange(part.shape[-1]) + rank",
        "samples of several processes are in another order than their labels",
        "test_synapses.py::test_samples_of_several_processes_are_in_the_order_of_the_data_set",
    ),
    (
        _SPREAD,
        "half = Z95 * sd / math.sqrt(n)",
        "half = Z95 * sd",
        "the interval is that of single samples, not of their mean",
        "test_synapses.py::test_the_interval_of_a_mean_narrows_with_the_samples",
    ),
    (
        _PAPER,
        "mean = [sum(step) / 3 for step",
        "mean = [sum(step) / 2 for step",
        "R-bar is no mean of three rates",
        "test_energy.py::test_paper_mode_charges_the_rates_of_the_supplement",
    ),
    (
        _PAGE,
        '"mean", 100 * row.mean_rate / top',
        '"mean", 100 * row.rate[-1] / top',
        "the bars of the page are the rates of the last step",
        "test_firing.py::test_bars_of_the_page_are_mean_rates_with_a_dot_for_each_step",
    ),
    (
        _CELLS,
        '"moving average" if facts["config"]["use_ema"] else "as trained"',
        '"as trained" if facts["config"]["use_ema"] else "moving average"',
        "the report names the wrong weights",
        "test_firing_num.py::test_moving_average_weights_on_request",
    ),
)
