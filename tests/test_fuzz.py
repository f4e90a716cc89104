"""The fuzz itself: what it calls a fault, and that a case comes out the same again."""

from __future__ import annotations

import pytest

from tests.fuzzing.cases import GENERATORS, Case, Outcome, load_generators, make_case, run_case, shared_out
from utils.errors import UserError

load_generators()


def raiser(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "valid", "expected"),
    [
        (lambda: 0, None, Outcome.OK),
        (lambda: print("warning: lr 1 is ignored"), None, Outcome.SAID),
        (lambda: print("warning: lr 1 is ignored"), False, Outcome.SAID),
        (lambda: print("epoch 1"), False, Outcome.SILENT),
        (raiser(UserError("a.yml:3: lr: -1 is not valid")), None, Outcome.REFUSED),
        (raiser(UserError("something is not valid")), False, Outcome.UNNAMED),
        (raiser(UserError("lr: 1 is not valid")), True, Outcome.WRONG),
        (raiser(SystemExit(0)), True, Outcome.OK),
        (raiser(SystemExit(2)), None, Outcome.UNNAMED),
        (raiser(ValueError("lr")), None, Outcome.TRACEBACK),
        (raiser(MemoryError()), None, Outcome.TRACEBACK),
    ],
)
def test_what_becomes_of_a_case(monkeypatch, tmp_path, call, valid, expected):
    monkeypatch.setitem(GENERATORS, "one", lambda rng, folder: Case("one", call, ("lr",), valid))
    result = run_case("one", 0, 0, tmp_path)
    assert result.outcome is expected
    assert result.outcome.is_fault is (expected not in (Outcome.OK, Outcome.SAID, Outcome.REFUSED))
    assert '--only "one" --seed 0 --case 0' in str(result)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_case_is_the_same_again(name, tmp_path):
    words = [[make_case(name, seed, number, tmp_path).what for number in range(4)] for seed in (1, 1, 2)]
    assert words[0] == words[1]
    assert words[0] != words[2]


def test_cases_are_shared_out():
    counts = shared_out(1000, ["settings", "schedules", "launchers"])
    assert counts["settings"] > counts["schedules"] > counts["launchers"] > 0
    assert abs(sum(counts.values()) - 1000) < 3
