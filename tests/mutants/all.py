"""All faults."""

from __future__ import annotations

from . import config, data, files, kernels, measurement, model, sparse, training

MUTANTS = [
    mutant
    for area in (config, files, training, model, kernels, sparse, measurement, data)
    for mutant in area.MUTANTS
]  # fmt: skip
AREAS = tuple(dict.fromkeys(mutant.area for mutant in MUTANTS))
