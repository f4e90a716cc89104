"""Faults in the measurement: counts, energy, the proof, the report."""

from __future__ import annotations

from .mutant import faults

_ENERGY, _COUNTS, _SYNAPSES = "utils/measure/energy.py", "utils/measure/synapse_counts.py", "utils/measure/synapses.py"
_VERIFY, _FIRING, _EXTRAS = "utils/measure/verify.py", "utils/measure/firing.py", "utils/measure/energy_extras.py"
_PAPER = "utils/measure/sdt/paper_energy.py"

MUTANTS = faults(
    "measurement",
)
