"""The benchmarks measure what they say: pairing of rounds, order, work counted, memory of a child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import load_json
from tiny import TINY_RUN

import model
from benchmarks import (
    ann,
    before_after,
    children,
    compare,
    firing_at,
    measure,
    plain,
    same_training,
    sizes,
    spikingjelly2,
)
from benchmarks.candidates import Candidate
from module.kernels import cpu
from module.kernels.parts import FusedPart
from module.kernels.substitute import Substitute
from module.neuron import SpikingNode, sj_neuron

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("most", "found"), [(100, 96), (32, 32), (7, 0), (1000, 1000)])
def test_the_largest_batch_is_found_between_doublings(most, found):
    def build(size: str, batch: int, device: torch.device) -> measure.Call:
        def step() -> None:
            if batch > most:
                raise torch.cuda.OutOfMemoryError

        return step

    assert compare.largest_batch(build, "cifar", 32, CPU) == found


def test_a_prepared_folder_of_spikingjelly_2_is_used_as_it_is(tmp_path, monkeypatch):
    def install(command: list[str], check: bool) -> None:
        raise AssertionError(f"there is no package index here: {command}")

    monkeypatch.setattr(subprocess, "run", install)
    (tmp_path / f"spikingjelly-{spikingjelly2.VERSION}.dist-info").mkdir()
    spikingjelly2.install(tmp_path)
    with pytest.raises(AssertionError, match=f"--target', '{tmp_path / 'other'}'"):
        spikingjelly2.install(tmp_path / "other")


def test_spikingjelly_2_runs_with_the_interpreter_that_is_given(tmp_path, monkeypatch, capsys):
    """Here with one that has another version, which is said."""
    monkeypatch.setattr(sys, "argv", ["spikingjelly2", "--size", "digits", "--batch", "2", "--rounds", "1"])
    sys.argv += ["--device", "cpu", "--python", sys.executable, "--folder", str(tmp_path / "unused")]
    spikingjelly2.main()
    printed = capsys.readouterr().out
    assert f"not {spikingjelly2.VERSION}; give another --folder or --python" in printed
    assert "| ours:fp32" in printed
    assert not (tmp_path / "unused").exists()


def test_a_failing_candidate_is_a_row_with_its_reason_and_the_others_go_on(capsys):
    calls: list[str] = []

    def second_call_fails() -> None:
        calls.append("b")
        if calls.count("b") == 2:
            raise KeyError("kernel")

    def cannot_be_built() -> measure.Call:
        raise ValueError("no such device\nmore")

    candidates = {"a": lambda: calls.append("a"), "b": second_call_fails, "c": measure.on_first_call(cannot_be_built)}
    seconds = measure.interleave(candidates, rounds=3)
    assert list(seconds) == ["a"]
    assert len(seconds["a"]) == 3
    assert seconds.failed == {"b": "KeyError: 'kernel'", "c": "ValueError: no such device"}
    assert calls.count("b") == 2
    gain = measure.speedup(seconds, "c", "a").median
    measure.print_table(["name", "speed-up"], [["a", f"{gain:.1f}"]], seconds.failed)
    measure.print_json("test", {"a": gain}, failed=seconds.failed)
    out, err = capsys.readouterr()
    assert "| c    | failed: ValueError: no such device |" in out
    assert json.loads(out.splitlines()[-1])["results"] == {"a": None}  # NaN is no JSON
    assert "second_call_fails" in err  # a fault of the code leaves its traceback
    assert "cannot_be_built" not in err


def test_what_is_made_on_the_first_call_is_made_once():
    made: list[int] = []

    def make() -> measure.Call:
        made.append(1)
        return lambda: len(made)

    call = measure.on_first_call(make)
    assert not made
    assert [call(), call()] == [1, 1]


@pytest.mark.parametrize("mode", ["lif", "plif"])
def test_the_baseline_runs_spikingjellys_neurons_whatever_stands_in_module(mode, monkeypatch):
    monkeypatch.setattr(SpikingNode, "forward", None)
    network = plain.PlainSDT(**sizes.arguments("digits"), spike_mode=mode)
    nodes = [m for m in network.modules() if isinstance(m, sj_neuron.BaseNode)]
    kind = {"lif": sj_neuron.LIFNode, "plif": sj_neuron.ParametricLIFNode}[mode]
    for method in ("multi_step_forward", "single_step_forward", "neuronal_charge", "neuronal_fire", "neuronal_reset"):
        assert all(getattr(type(node), method) is getattr(kind, method) for node in nodes)
    assert not any(isinstance(m, Substitute | SpikingNode) for m in network.modules())
    x, _ = sizes.batch("digits", 2, CPU)
    with torch.no_grad():
        assert torch.equal(network.eval()(x)[0], network(x[[0, 1]])[0])  # the state lasts for one forward pass
        assert network(x[:1])[0].shape == (1, 10)


def test_the_baselines_state_is_float32_for_16_bit_inputs():
    x = torch.randn(4, 8, 16, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    neuron = plain.neuron()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes = neuron(x)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes, neuron(x.float()).bfloat16())
    assert not torch.equal(spikes, plain.neuron(neuron_dtype="input")(x))
    with pytest.raises(ValueError, match=r"qif.*lif and plif"):
        plain.neuron("qif")


@pytest.mark.skipif(cpu.why_unusable() is not None, reason=str(cpu.why_unusable()))
def test_ours_is_accelerated_and_unaccelerated_is_not():
    parts = {
        name: [
            m for m in Candidate(name).build("digits", CPU, training=False)[0].modules() if isinstance(m, Substitute)
        ]
        for name in ("ours:fp32:fuse", "ours:fp32:unaccelerated", "plain:fp32", "plain:fp32:cpp")
    }
    assert sum(isinstance(part, FusedPart) for part in parts["ours:fp32:fuse"]) == 3
    assert not parts["ours:fp32:unaccelerated"]
    assert not parts["plain:fp32"]
    assert parts["plain:fp32:cpp"]
    assert not any(isinstance(part, FusedPart) for part in parts["plain:fp32:cpp"])


@pytest.mark.parametrize("name", ["ours", "our:fp32", "ours:fp64", "ours:fp32:fused"])
def test_an_unknown_candidate_is_told_with_the_known_words(name):
    with pytest.raises(ValueError, match=f"{name}' is not .*bf16.*unaccelerated"):
        Candidate(name).build("digits", CPU, training=False)


def test_peak_memory_sees_what_was_freed_again():
    with measure.PeakMemory(CPU) as memory:
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


def test_a_child_does_one_step_per_call_and_its_reason_comes_back():
    answers = "print('a word' if i else '', 'failed: bad' if i else 'done', sep='\\n', flush=True)"
    serve = f"import sys\nfor i, _ in enumerate(sys.stdin): {answers}"
    with children.SteppingChild([sys.executable, "-c", serve], {}) as step:
        step()
        with pytest.raises(RuntimeError, match="failed: bad"):
            step()
    with (
        children.SteppingChild([sys.executable, "-c", ""], {}) as step,
        pytest.raises(RuntimeError, match="the process ended"),
    ):
        step()


def test_before_and_after_run_the_same_rows_by_the_old_arguments_and_by_accelerate(monkeypatch):
    before_after.step_of("digits evaluate fp32 fuse", 2, CPU)()
    given: list[dict[str, object]] = []

    def old_sdt(*, engine: str = "dense", bf16_input_grad: bool = False, **arguments: object) -> torch.nn.Module:
        given.append({"engine": engine, "bf16_input_grad": bf16_input_grad})
        return model.SpikeDrivenTransformer(img_size=32, in_channels=1, num_classes=10, embed_dims=8, num_heads=1)

    real = before_after.found
    monkeypatch.setattr("model.sdt", old_sdt)
    monkeypatch.setattr(before_after, "found", lambda *places: None if "accelerate" in places[0] else real(*places))
    for row in ("digits train fp32", "digits train fp32 sparse bf16-grad"):
        before_after.step_of(row, 2, CPU)()
    assert given == [
        {"engine": "dense", "bf16_input_grad": False},
        {"engine": "event", "bf16_input_grad": True},
    ]


def test_training_step_and_evaluation_of_each_kind_agree_on_the_loss():
    losses = {name: Candidate(name).training_step("digits", 2, CPU)() for name in ("plain:fp32", "ours:fp32")}
    assert losses["ours:fp32"] == pytest.approx(losses["plain:fp32"], rel=1e-3)
    plain, ours = (Candidate(name).evaluation("digits", 2, CPU)() for name in ("plain:fp32", "ours:fp32:fuse"))
    assert torch.allclose(plain, ours, atol=1e-3)


@pytest.mark.parametrize("beta", [0.999, 0.99])
def test_a_run_that_differs_from_the_published_computation_is_found(written, tmp_path, monkeypatch, capsys, beta):
    # The second time ours alone is trained with another beta.
    optimizers = []

    def make_optimizer(cfg, model):
        optimizers.append(torch.optim.AdamW(model.parameters(), betas=(0.9, beta if len(optimizers) % 2 else 0.999)))
        return optimizers[-1]

    monkeypatch.setattr(same_training, "make_optimizer", make_optimizer)
    arguments = [
        "same_training",
        "-c",
        written(TINY_RUN),
        "--workers",
        "0",
        "--steps",
        "3",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert same_training.main() == (0 if beta == 0.999 else 1)
    assert len((tmp_path / "out" / "a_plain_and_ours.csv").read_text().splitlines()) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "benchmarks.same_training"


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
    assert "not on a CUDA device" in line["failed"]["cupy"]


SMALL = dict(img_size=8, num_classes=4, embed_dims=16, num_heads=2, depths=2, pooling_stat="0011")


def test_the_twin_is_the_network_with_relu_and_softmax_attention():
    """Where the attention gives nothing, it is the spiking network with ReLU in place of each neuron, in one pass."""
    torch.manual_seed(0)
    net = model.sdt(**SMALL, T=1).eval()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    for block in net.block:
        torch.nn.init.zeros_(block.attn.proj_conv.weight)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        twin = ann.ANN(net).eval()(x)
        for name in [name for name, _ in net.named_modules() if "lif" in name.split(".")[-1]]:
            net.set_submodule(name, torch.nn.ReLU())
        assert torch.allclose(twin, net(x)[0], rtol=1e-4, atol=1e-4)
        block, q, v = ann.Block(net.block[0]), torch.zeros(16, 16, 1, 1), torch.eye(16)[:, :, None, None]
        block.qkv.weight.copy_(torch.cat([q, q, v]))  # all tokens are equally near: the mean of them is added
        block.proj.weight.copy_(v)
        torch.nn.init.zeros_(block.fc2.weight)
        u = torch.randn(2, 16, 4, 4)
        assert torch.allclose(block(u), u + u.relu().mean(dim=(2, 3), keepdim=True), atol=1e-5)


def test_a_network_fires_at_the_rates_it_is_given():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = firing_at.random_network(SMALL, x)
    wanted = {name: 0.1 + 0.02 * i for i, name in enumerate(firing_at.shifts(net))}
    firing_at.set_rates(net, wanted, x)
    found = firing_at.rates_of(net, x)
    assert len(wanted) == 4 + 2 * 6
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=0.02)
