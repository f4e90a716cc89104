"""Faults in the data: transforms, splits, order, events, tars."""

from __future__ import annotations

from .mutant import faults

MUTANTS = faults(
    "data",
)
