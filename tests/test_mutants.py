"""Every fault of tests/mutants can be planted, and names tests that exist."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
from mutants.all import AREAS, MUTANTS
from mutants.mutant import ROOT

FEWEST = 12  # of each area


@pytest.mark.parametrize("area", AREAS)
def test_each_fault_fits_its_file_once_and_changes_it(area):
    for mutant in MUTANTS:
        if mutant.area == area:
            source = (ROOT / mutant.file).read_text()
            assert mutant.mutated(source) != source, mutant.why  # DoesNotApply names file and text


@cache
def names_in(file: str) -> set[str]:
    return set(re.findall(r"^\s*(?:def|class) (\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE))


def test_the_tests_that_are_to_find_them_exist():
    for mutant in MUTANTS:
        assert mutant.tests, mutant.why
        for test in mutant.tests:
            file, *names = test.split("::")
            assert {name.partition("[")[0] for name in names} <= names_in(file), test


def test_every_area_has_enough_faults_and_no_fault_comes_twice():
    counted = Counter(mutant.area for mutant in MUTANTS if not mutant.harmless)
    assert all(counted[area] >= FEWEST for area in AREAS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.why for mutant in MUTANTS)
