"""The benchmarks measure what they say: pairing of rounds, order, work counted, memory of a child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import load_json

from benchmarks import children, compare, measure, sizes
from benchmarks.candidates import Candidate


def test_rounds_are_interleaved_and_start_with_another_candidate_each_time():
    calls: list[str] = []
    seconds = measure.interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    # The machine is ten times slower in the last rounds: the ratio of the medians would say 20.
    seconds = {"plain": [2.0, 20.0, 20.0], "ours": [1.0, 1.0, 10.0]}
    assert measure.speedup(seconds, "plain", "ours").median == 2.0
    assert measure.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == measure.Spread(3.0, 2.0, 4.0, 5)
    with pytest.raises(ValueError, match="nothing was measured"):
        measure.Spread.of([])


def test_peak_memory_sees_what_was_freed_again():
    with measure.PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**20)  # 256 MiB
        del block
    assert memory.peak - memory.before > 200


@pytest.mark.parametrize(("size", "name"), [("imagenet-384", "8-384"), ("imagenet-768", "8-768")])
def test_counted_work_is_that_of_the_paper(size, name):
    table = str(load_json("macs"))
    assert name in table
    expected = {"8-384": 4660.7e6, "8-768": 18512.1e6}[name]  # per time step
    head = sizes.arguments(size)["embed_dims"] * 1000
    assert abs(compare.macs_per_image(size) / 4 - expected) < head + 1e5


def test_a_failing_child_is_reported_with_its_message():
    with pytest.raises(RuntimeError, match="No module named"):
        children.in_child("benchmarks.no_such_benchmark", [])


def test_training_step_and_evaluation_of_each_kind_agree_on_the_loss():
    device = torch.device("cpu")
    losses = {name: Candidate(name).training_step("digits", 2, device)() for name in ("plain:fp32", "ours:fp32")}
    assert losses["ours:fp32"] == pytest.approx(losses["plain:fp32"], rel=1e-3)
    plain, ours = (Candidate(name).evaluation("digits", 2, device)() for name in ("plain:fp32", "ours:fp32:fuse"))
    assert torch.allclose(plain, ours, atol=1e-3)


def test_a_benchmark_ends_in_one_json_line_with_the_machine():
    root = Path(__file__).resolve().parent.parent
    command = ["-m", "benchmarks.neuron", "--device", "cpu", "--shape", "2", "2", "4", "4", "4", "--rounds", "2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "benchmarks.neuron"
    assert line["machine"]["cpu"]
    assert line["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert line["results"]["lean forward"]["ms"] > 0
