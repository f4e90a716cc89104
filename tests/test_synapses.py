"""Operations are counted exactly: against loops over every spike and weight, for any batches, steps and processes."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from model import sdt
from module.neuron import sj_neuron
from utils.measure.firing import FiringRecorder
from utils.measure.sdt.names import token_sums
from utils.measure.spike_values import ROWS, Values, count_values
from utils.measure.spread import Spread
from utils.measure.synapses import SynapseRecorder
from utils.measure.totals import interleaved
from utils.run.distributed import Process

CPU = torch.device("cpu")


def lif(step_mode="m"):
    return sj_neuron.LIFNode(step_mode=step_mode, detach_reset=True)


def tiny_sdt(**changes):
    """An untrained network small enough for loops, with weights that make every layer fire."""
    torch.manual_seed(0)
    sizes = dict(img_size_h=8, img_size_w=8, in_channels=1, num_classes=3, embed_dims=8, num_heads=2, depths=1)
    model = sdt(**(sizes | dict(T=3, mlp_ratios=2, pooling_stat="0100") | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    return model.eval()


def brute_force(module: nn.Module, x: Tensor) -> int:
    """Additions of one layer for inputs `[L, C, ...]`, by a loop over non-zero inputs and the weights they meet."""
    if isinstance(module, nn.Linear):
        return sum(module.out_features for _ in x.nonzero().tolist())
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    axes = range(len(kernel))
    sizes = module(x).shape[2:]
    found = 0
    for spike in x.nonzero().tolist():
        for tap in itertools.product(*(range(k) for k in kernel)):
            for out in itertools.product(*(range(n) for n in sizes)):
                if all(out[a] * stride[a] - module.padding[a] + tap[a] * dilation[a] == spike[2 + a] for a in axes):
                    found += module.out_channels // module.groups
    return found


def count_alone(layer: nn.Module, x: Tensor):
    with SynapseRecorder(layer) as recorder:
        layer(x)
    (row,) = recorder.counts().layers
    return row


CONVS = {
    "padded": nn.Conv2d(2, 3, 3, padding=1),
    "strided": nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(2, 3, 3, dilation=2, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "oblong": nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 2)),
    "one by one": nn.Conv2d(2, 5, 1),
    "without padding": nn.Conv2d(2, 3, 3),
    "one dimension": nn.Conv1d(2, 3, 3, padding=1),
    "three dimensions": nn.Conv3d(1, 2, 2, padding=1),
}


@pytest.mark.parametrize("name", CONVS)
def test_exact_counts_are_those_of_a_loop_over_spikes_and_weights(name):
    torch.manual_seed(0)
    layer = CONVS[name]
    dims = len(layer.kernel_size)
    x = (torch.rand(2, layer.in_channels, *([5] * dims if dims < 3 else [3] * 3)) < 0.4).float()
    with torch.no_grad():
        row = count_alone(layer, x)
        assert row.synops == [brute_force(layer, x)]
    assert row.nonzero == [int(x.sum())]
    assert row.is_binary


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_repeats_inputs_uses_their_weights_too(mode):
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = (torch.rand(1, 1, 4, 5) < 0.5).float()
    with torch.no_grad():
        assert count_alone(layer, x).synops == [int(layer(x).sum())]  # weights are 1: the sum is the count


@pytest.mark.filterwarnings("ignore:.*even kernel lengths:UserWarning")  # the case at hand
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_padding_same_is_counted(kernel):
    layer = nn.Conv2d(1, 1, kernel, padding="same")
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = (torch.rand(1, 1, 5, 6) < 0.5).float()
    with torch.no_grad():
        assert count_alone(layer, x).synops == [int(layer(x).sum())]


@pytest.mark.parametrize(("side", "share"), [(28, 0.953), (14, 0.907)])
def test_the_formula_overcounts_padding_taps(side, share):
    row = count_alone(nn.Conv2d(1, 2, 3, padding=1), torch.ones(1, 1, side, side))
    assert sum(row.synops) / row.macs_per_step == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("dvs_mode", [False, True])
def test_a_whole_network_is_counted_as_by_loops(dvs_mode):
    model = tiny_sdt(dvs_mode=dvs_mode)
    entered: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [
        m.register_forward_hook(lambda m, args, out, n=n: entered.setdefault(n, []).append(args[0]))
        for n, m in layers.items()
    ]
    x = torch.randn(2, 1, 8, 8)
    sums: list[Tensor] = []
    model.block[0].attn.kv_pool.register_forward_hook(lambda m, args, out: sums.append(out))
    with torch.no_grad(), SynapseRecorder(model, sums=token_sums(model)) as recorder:
        model(x)
    counts = recorder.counts()
    for handle in handles:
        handle.remove()
    assert {row.name for row in counts.layers} == set(layers)
    with torch.no_grad():
        for row in counts.layers:
            (inputs,) = entered[row.name]
            per_step = inputs.reshape(3, 2, *inputs.shape[-3:]) if inputs.dim() == 4 else inputs
            assert row.synops == [brute_force(layers[row.name], step) for step in per_step], row.name
            assert row.steps == 3
    assert sum(sum(row.synops) for row in counts.layers[1:]) > 1000
    (attention,) = counts.sums
    assert attention.nonzero == [int((step != 0).sum()) for step in sums[0]]
    assert sum(attention.nonzero) > 0


def test_the_entering_rate_is_the_one_after_the_pool():
    model = tiny_sdt(pooling_stat="1110", img_size_h=16, img_size_w=16)
    with torch.no_grad(), SynapseRecorder(model) as recorder, FiringRecorder(model.spike_sources()) as firing:
        model(torch.randn(4, 1, 16, 16))
    fired = {row.name: row.rate for row in firing.rows(Process(0, 1, CPU))}
    entering = {row.name: row.rate for row in recorder.counts().layers}
    for neuron, conv in (("", "1"), ("1", "2"), ("2", "3")):
        before, after = fired[f"MS_SPS_lif{neuron}"], entering[f"patch_embed.proj_conv{conv}"]
        assert all(b < a for b, a in zip(before, after, strict=True))
    assert fired["MS_SPS_lif3"] == entering["patch_embed.rpe_conv"]  # no pool between them


@pytest.mark.parametrize("split", [[7], [3, 3, 1], [1] * 7])
def test_counts_do_not_depend_on_the_batches(split):
    # float64: in float32 another batch size sums in another order, which can flip a spike
    model = tiny_sdt(T=5).double()
    x = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    results = []
    for batches in ([7], split):
        with torch.no_grad(), SynapseRecorder(model, sums=token_sums(model)) as recorder:
            for batch in x.split(batches):
                model(batch)
        results.append(recorder.counts())
    assert results[0] == results[1]
    assert results[0].samples == 7
    assert results[0].time_steps == 5


def test_the_mean_of_equal_batches_is_theirs():
    # Dividing by (batches - 1) gave .375 for three batches at .25, and a division by zero for one.
    layer = nn.Linear(8, 2, bias=False)
    x = torch.zeros(1, 4, 8)
    x[..., :2] = 1
    for batches in (1, 3):
        with SynapseRecorder(layer) as recorder:
            for _ in range(batches):
                layer(x)
        assert recorder.counts().layers[0].mean_rate == 0.25


class Multi(nn.Module):
    """A small network that is no transformer; time is the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.bn, self.lif1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), lif()
        self.conv2, self.lif2 = nn.Conv2d(4, 4, 3, stride=2), lif()
        self.fc = nn.Linear(4 * 3 * 3, 3)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.8)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, 1, 8, 8]
        for neuron in (self.lif1, self.lif2):
            neuron.reset()
        x = self.lif1(self.bn(self.conv1(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        x = self.lif2(self.conv2(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.fc(x.flatten(2)).mean(0)


class Single(Multi):
    """The same, one step at a time; the loop over time is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lif1.step_mode = self.lif2.step_mode = "s"

    def step(self, x: Tensor) -> Tensor:
        return self.fc(self.lif2(self.conv2(self.lif1(self.bn(self.conv1(x))))).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        for neuron in (self.lif1, self.lif2):
            neuron.reset()
        return torch.stack([self.step(step) for step in x]).mean(0)


class OneStep(Single):
    """The same; the script loops over time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


def test_multi_step_single_step_and_loops_outside_count_the_same():
    x = torch.randn(6, 5, 1, 8, 8, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for kind in (Multi, Single):
            model = kind().double().eval()
            with SynapseRecorder(model) as recorder:
                model(x)
                model(x[:, :2])
            found.append(recorder.counts())
        model = OneStep().double().eval()
        with SynapseRecorder(model) as recorder:
            for batch in (x, x[:, :2]):
                model.lif1.reset(), model.lif2.reset()
                with recorder.batch():
                    for step in batch:
                        model(step)
        found.append(recorder.counts())
    assert found[0] == found[1] == found[2]
    assert (found[0].samples, found[0].time_steps) == (7, 6)
    assert [row.name for row in found[0].layers] == ["conv1", "conv2", "fc"]
    assert [row.is_binary for row in found[0].layers] == [False, True, True]
    assert min(found[0].layers[1].nonzero) > 0
    assert found[0].neurons_per_step == {"lif1": 4 * 8 * 8, "lif2": 4 * 3 * 3}
    assert found[0].norms_per_step == {"bn": 4 * 8 * 8}


def test_a_layer_before_time_runs_once():
    class Encoded(Multi):
        def forward(self, x: Tensor) -> Tensor:  # [B, 1, 8, 8]
            self.lif1.reset()
            return self.lif1(self.conv1(x).expand(6, -1, -1, -1, -1)).mean()

    model = Encoded()
    with torch.no_grad(), SynapseRecorder(model) as recorder:
        model(torch.randn(5, 1, 8, 8))
    counts = recorder.counts()
    assert (counts.layers[0].steps, counts.time_steps, counts.samples) == (1, 6, 5)
    assert counts.layers[0].macs_per_step == 9 * 64 * 4
    assert counts.never_called == ["conv2", "fc"]


def test_neurons_without_a_threshold_tell_the_time_steps_if_they_are_named():
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).float()

        def reset(self) -> None: ...

    model = Multi()
    model.lif1, model.lif2 = Sign(), Sign()
    with torch.no_grad(), SynapseRecorder(model, timed={"first": model.lif1}) as recorder:
        model(torch.randn(6, 5, 1, 8, 8))
    counts = recorder.counts()
    assert (counts.time_steps, counts.samples) == (6, 5)
    assert [row.steps for row in counts.layers] == [6, 6, 6]


def test_samples_are_those_that_enter_also_where_neurons_see_windows_of_them():
    class Windows(Multi):
        def forward(self, x: Tensor) -> Tensor:  # [B, 1, 8, 8]
            self.lif1.reset()
            windows = x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # [2 B, 1, 4, 8]
            return self.lif1(self.conv1(windows).expand(6, -1, -1, -1, -1))

    with torch.no_grad(), SynapseRecorder(model := Windows()) as recorder:
        model(torch.randn(5, 1, 8, 8))
    assert recorder.counts().samples == 5


def test_layers_are_chosen_by_type_not_by_name():
    model = tiny_sdt()
    with torch.no_grad(), SynapseRecorder(model) as recorder:
        model(torch.randn(1, 1, 8, 8))
    counts = recorder.counts()
    names = [row.name for row in counts.layers]
    assert names[-1] == "head"
    assert {"patch_embed.rpe_conv", "block.0.attn.proj_conv"} <= set(names)
    assert not any("lif" in name or "bn" in name or "talking" in name for name in names)
    assert counts.never_called == ["block.0.attn.talking_heads"]
    assert counts.unpriced == []


def test_a_layer_whose_shapes_do_not_tell_the_step_is_counted_in_one():
    class Odd(Multi):
        def forward(self, x: Tensor) -> Tensor:
            self.lif1.reset()
            self.lif1(x)
            return self.conv1(torch.ones(30, 1, 8, 8))  # as many as T * B of the first batch, by chance

    with torch.no_grad(), SynapseRecorder(model := Odd()) as recorder:
        for batch in (5, 4, 5):
            model(torch.randn(6, batch, 1, 8, 8))
    (layer,) = recorder.counts().layers
    assert layer.nonzero == [3 * 30 * 64]
    assert layer.macs_per_step == round(3 * 30 * 9 * 64 * 4 / 14)  # the mean of 14 samples
    assert layer.rate == [pytest.approx(1, rel=1e-2)]


def test_batches_of_different_lengths_in_time_are_refused():
    model = Multi()
    with torch.no_grad(), SynapseRecorder(model):
        model(torch.randn(6, 1, 1, 8, 8))
        with pytest.raises(ValueError, match="4 time steps, those before 6"):
            model(torch.randn(4, 1, 1, 8, 8))


def test_nothing_of_a_batch_stays_alive_and_hooks_go():
    model = tiny_sdt()
    x = torch.randn(2, 1, 8, 8)
    seen: list[weakref.ref] = []
    handle = model.block[0].attn.q_lif.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    with torch.no_grad(), SynapseRecorder(model) as recorder, FiringRecorder(model.spike_sources()):
        model(x)
        gc.collect()
        assert seen[0]() is None
    assert all(total.counts.numel() in (0, 3 * ROWS) for total in recorder._totals.values())  # T x counts
    assert not recorder._calls
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Together(Process):
    """One of several processes, here threads, that sum as processes do."""

    def __init__(self, rank, barrier, shared):
        super().__init__(rank, barrier.parties, CPU)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "shared", shared)

    def sum_tensor(self, values):
        self.shared[self.rank] = values
        self.barrier.wait(10)
        assert len({v.shape for v in self.shared.values()}) == 1
        total = sum(self.shared.values())
        self.barrier.wait(10)
        return total

    def gather_objects(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(10)
        found = [self.shared[rank] for rank in range(self.world_size)]
        self.barrier.wait(10)
        return found


@pytest.mark.parametrize("shares", [[4, 3], [7, 0], [3, 2, 2]])
def test_counts_do_not_depend_on_the_processes(shares):
    model = tiny_sdt().double()
    x = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    barrier, shared, found = threading.Barrier(len(shares)), {}, {}
    recorders = []
    with torch.no_grad():
        for part in x.split(shares):
            synapses = SynapseRecorder(model, sums=token_sums(model))
            firing = FiringRecorder(model.spike_sources())
            with synapses, firing:
                if len(part):
                    model(part)
            recorders.append((synapses, firing))
        alone = SynapseRecorder(model, sums=token_sums(model))
        fired_alone = FiringRecorder(model.spike_sources())
        with alone, fired_alone:
            model(x)

    def collect(rank):
        process = Together(rank, barrier, shared)
        synapses, firing = recorders[rank]
        found[rank] = (synapses.counts(process), firing.rows(process))

    threads = [threading.Thread(target=collect, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == (alone.counts(), fired_alone.rows(Process(0, 1, CPU)))


def test_nothing_counted_is_an_error():
    model = tiny_sdt()
    with SynapseRecorder(model) as recorder:
        pass
    with pytest.raises(ValueError, match="nothing was counted"):
        recorder.counts()
    with FiringRecorder(model.spike_sources()) as firing:
        pass
    with pytest.raises(ValueError, match="no batch passed"):
        firing.rows(Process(0, 1, CPU))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1, 0], Values()),
        ([0, -1, 1, 1], Values("ternary")),
        ([0, 0.5, -0.5, 0.5], Values("scaled", 0.5, 0.5)),
        ([0, 3, 1, 2], Values("integer", 1.0, 3.0)),
        ([0, 3, 1, 0.5], Values("real", 0.5, 3.0)),
        ([0, 300, 1, 2], Values("real", 1.0, 300.0)),  # too large for a number of spikes
    ],
)
def test_one_value_of_another_kind_decides_the_kind_of_all(values, expected):
    found = count_values(torch.tensor(values, dtype=torch.float32).view(1, -1))
    assert Values.of(found.counts.sum(dim=1).tolist(), found.low, found.high) == expected


def test_samples_of_several_processes_are_in_the_order_of_the_data_set():
    samples = torch.arange(7)
    assert torch.equal(interleaved([samples[rank::3] for rank in range(3)]), samples)


def test_the_interval_of_a_mean_narrows_with_the_samples():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = Spread.of(values)
    sd = (((values - 3) ** 2).sum() / 3) ** 0.5
    assert (found.samples, found.mean, found.minimum, found.maximum) == (4, 3.0, 1.0, 6.0)
    assert found.sd == pytest.approx(float(sd))
    assert found.mean_interval == pytest.approx((3 - 1.959964 * float(sd) / 2, 3 + 1.959964 * float(sd) / 2))
    assert Spread.of(values[:1]) == Spread(1, 1.0, None, None, 1.0, 1.0)
