"""The fuzz itself: what it calls a fault, and that a case comes out the same again."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.fuzzing.cases import GENERATORS, Case, Outcome, load_generators, make_case, run_case, shared_out
from tests.fuzzing.programs import Program, run_script
from tests.fuzzing.worker import Worker
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
    assert sum(counts.values()) == 1000
    assert sum(shared_out(2000, sorted(GENERATORS)).values()) == 2000


@pytest.mark.slow
def test_a_short_fuzz_finds_no_fault():
    """`python -m tests.fuzz --cases 2000 --seed N` is the long one."""
    with Worker(limit=120.0) as worker:
        results = [
            worker.run(name, 11, number)
            for name, count in shared_out(40, sorted(GENERATORS)).items()
            for number in range(count)
        ]
    assert not [str(result) for result in results if result.outcome.is_fault]
    assert len({result.outcome for result in results}) > 1


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import os, sys; print(sys.argv[1], os.environ['WORD'])", None),
        ("import sys; print('a.py: error: lr', file=sys.stderr); sys.exit(2)", UserError),
        ("import sys; print('a.py: error: lr'); sys.exit(2)", RuntimeError),  # where nobody looks for errors
        ("import sys; sys.exit(2)", RuntimeError),  # without a word
        ("import sys; print('Traceback, a.py: error: lr', file=sys.stderr); sys.exit(2)", RuntimeError),
        ("raise SystemExit(1)", RuntimeError),
        ("import os; os.kill(os.getpid(), 9)", RuntimeError),
        ("print('Traceback (most recent call last):')", RuntimeError),
    ],
)
def test_how_a_process_ended(tmp_path, capsys, script, error):
    (tmp_path / "a.py").write_text(script)
    with pytest.raises(error) if error else contextlib.nullcontext():
        run_script(tmp_path / "a.py", ["--lr"], {"WORD": "3"})
    assert error or "--lr 3" in capsys.readouterr().out


def test_one_of_fifty_calls_of_a_program_has_a_process_of_its_own(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(Program, "in_a_process", lambda program: ran.append(program.argv))
    monkeypatch.setitem(GENERATORS, "one", lambda rng, folder: Case("one", Program(lambda argv: 0, ["a"]), ()))
    assert [run_case("one", 0, number, tmp_path).what for number in range(100)].count("in a process: one") == len(ran)
    assert ran == [["a"]] * 2


FAULTS = {
    "hang": (lambda: time.sleep(600), Outcome.HANG),
    "die": (lambda: os.kill(os.getpid(), signal.SIGKILL), Outcome.DIED),
    "memory": (lambda: bytearray(2**45), Outcome.TRACEBACK),
    "run": (lambda: 0, Outcome.OK),
}


def register_faults():
    for name, (call, _) in FAULTS.items():
        GENERATORS[name] = lambda rng, folder, call=call: Case("planted", call, ("key",))


def test_a_case_that_hangs_or_dies_is_told_and_costs_no_other_case():
    with Worker(limit=2.0, prepare=register_faults) as worker:
        found = {name: worker.run(name, 0, 0).outcome for name in FAULTS}
    assert found == {name: outcome for name, (_, outcome) in FAULTS.items()}
