"""The complexity metrics of NeuroBench 2.x: Yik et al., "The NeuroBench framework for benchmarking neuromorphic
computing algorithms and systems", Nature Communications 16:1545, 2025.

They count what is there and price nothing. Definitions are those of the package neurobench 2.3.0; averages are per
sample, over all time steps, also for the first convolution of an image. Legend: T time steps, B batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from utils.measure.firing import FiringRow
from utils.measure.geometry import Geometry
from utils.measure.synapse_counts import COUNTED, Counts
from utils.measure.synapses import named_modules, neurons_of
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, Recorder, hooked

_ADDED = ("binary", "ternary")  # NeuroBench adds inputs of 0, 1 and -1, and multiplies all others


@dataclass(frozen=True)
class Static:
    """What can be counted of a model that does not run."""

    footprint: int  # bytes of parameters and buffers
    parameters: int
    connection_sparsity: float | None  # share of zeros among the weights of Conv and Linear layers

    @staticmethod
    def of(model: nn.Module) -> Static:
        tensors = [*model.parameters(), *model.buffers()]
        weights = [module.weight for module in model.modules() if isinstance(module, COUNTED)]
        total, zeros = (sum(counts) for counts in ([w.numel() for w in weights], [int(w.eq(0).sum()) for w in weights]))
        return Static(
            footprint=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            connection_sparsity=zeros / total if total else None,
        )


@dataclass(frozen=True)
class NeuroBench:
    """The metrics of one evaluation; None where something was not counted.

    activation_sparsity: share of zeros in the outputs of all spiking neurons.
    effective_macs, effective_acs: products of an input and a weight that are both not 0; ACs in layers that only 0, 1
        and -1 enter.
    dense: products, had no input and no weight been 0; those with padding do not count.
    membrane_updates: changes of a membrane potential between time steps; in the first step each counts.
    """

    footprint: int
    parameters: int
    connection_sparsity: float | None
    activation_sparsity: float | None
    effective_macs: float | None
    effective_acs: float | None
    dense: float | None
    membrane_updates: float | None
    membrane_update_samples: int  # that those were counted on
    spikes: dict[str, float] = field(default_factory=dict)  # outputs per sample that are not 0, by path of the neurons

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        shown = asdict(self)
        del shown["spikes"]
        return {"definitions": "NeuroBench 2.3.0"} | shown


class NeuroBenchRecorder(Recorder):
    """Counts while it is entered what the other recorders do not: outputs of neurons that are no source of theirs,
    operations of layers with zero weights, dense operations.

    Args:
        sources: the modules whose outputs a `FiringRecorder` counts.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, nn.Module]) -> None:
        neurons, counted = neurons_of(model), set(sources.values())
        paths = {module: path for path, module in neurons.items()}
        self._neurons = {name: m for name, m in neurons.items() if m not in counted}
        self._sources = {name: paths[m] for name, m in sources.items() if m in paths}
        self._layers = {name: m for name, m in named_modules(model).items() if isinstance(m, COUNTED)}
        self._masks = {name: m.weight.ne(0) for name, m in self._layers.items() if bool(m.weight.eq(0).any())}
        self._sums = dict.fromkeys((*self._neurons, *self._layers), (0, 0))

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with hooked(self._neurons, self._neuron_hook), hooked(self._layers, self._layer_hook):
            yield

    def _add(self, name: str, first: Tensor | int, second: int) -> None:
        """Counts stay on the device, because reading them would make the host wait for it."""
        kept = self._sums[name]
        self._sums[name] = kept[0] + first, kept[1] + second  # type: ignore[assignment]

    def _neuron_hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._add(name, output.count_nonzero(), output.numel())

        return count

    def _layer_hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            x = args[0].detach()
            met = _pairs(module, x.ne(0), self._masks[name]) if name in self._masks else 0
            self._add(name, met, _dense(module, x))

        return count

    def result(
        self,
        static: Static,
        counts: Counts,
        firing: Sequence[FiringRow],
        process: Process,
        updates: tuple[float | None, int] = (None, 0),
    ) -> NeuroBench:
        """All metrics, summed over all processes (each must call this).

        Args:
            counts, firing: what the other recorders counted over the same samples.
            updates: membrane updates per sample, and the samples that they were counted on.
        """
        flat = [int(part) for pair in self._sums.values() for part in pair]
        summed = [int(part) for part in process.sum(*flat)] if flat else []
        pairs = dict(zip(self._sums, zip(summed[::2], summed[1::2], strict=True), strict=True))
        outputs = {name: pairs[name] for name in self._neurons}
        for row in firing:
            if path := self._sources.get(row.name):
                outputs[path] = sum(row.nonzero), row.elements_per_step * len(row.nonzero)
        fired, elements = (sum(column) for column in zip((0, 0), *outputs.values(), strict=True))
        effective: dict[str, float | None] = {"MAC": 0.0, "AC": 0.0}
        for layer in counts.layers:
            if layer.name not in self._layers:
                continue
            kind = "AC" if layer.values.kind in _ADDED else "MAC"
            met = None if layer.synops is None else sum(layer.synops)
            if layer.name in self._masks:
                met = pairs[layer.name][0]
            elif layer.values.kind == "integer":
                met = None  # a spike of n was counted n times
            known = effective[kind]
            effective[kind] = None if met is None or known is None else known + met / counts.samples
        dense = sum(pairs[name][1] for name in self._layers) / counts.samples
        return NeuroBench(
            **asdict(static),
            activation_sparsity=1 - fired / elements if elements else None,
            effective_macs=effective["MAC"],
            effective_acs=effective["AC"],
            dense=dense,
            membrane_updates=updates[0],
            membrane_update_samples=updates[1],
            spikes={path: count / counts.samples for path, (count, _) in outputs.items()},
        )


def _pairs(module: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
    """How many pairs of an input and a weight meet that are both marked."""
    x, w = inputs.double(), weights.double()
    with _disable_current_modes():  # a recorder of operators must not take these for the model's
        if isinstance(module, nn.Linear):
            return (x.flatten(0, -2).sum(dim=0) @ w.sum(dim=0)).long()
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return module._conv_forward(x, w, None).sum().long()


def _dense(module: nn.Module, x: Tensor) -> int:
    """How many inputs and weights meet, whatever they are."""
    if isinstance(module, nn.Linear):
        return x.numel() * module.out_features
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    places = tuple(x.shape[-len(module.kernel_size) :])
    met = int(Geometry.of(module).place_taps(places).sum())  # per channel
    return x.numel() // math.prod(places) * met * (module.out_channels // module.groups)


def membrane_updates(model: nn.Module, x: Tensor) -> float | None:
    """Changes of membrane potentials per sample of `x`, whose samples are its first dimension; None for a network
    whose neurons do not show their potential (`v`, as SpikingJelly's do)."""
    neurons = neurons_of(model)
    changes = 0
    unknown = False
    last: dict[str, Tensor] = {}  # potentials of single-step neurons after the step before

    def make(name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal changes, unknown
            stepwise = getattr(module, "step_mode", "m") == "s"
            potentials = _now(module) if stepwise else _trajectory(module, args[0])
            if not potentials:
                unknown = True
                return
            before = last.get(name)
            changes += potentials[0].numel() if before is None else int((potentials[0] - before).count_nonzero())
            changes += sum(int((b - a).count_nonzero()) for a, b in itertools.pairwise(potentials))
            if stepwise:  # before a network resets its neurons
                last[name] = potentials[0].clone()

        return count

    training = model.training
    model.eval()
    try:
        with hooked(neurons, make), torch.no_grad():
            model(x)
    finally:
        model.train(training)
    return None if unknown or not neurons else changes / len(x)


def _now(neuron: nn.Module) -> list[Tensor]:
    """The membrane potential after the call that just ended; empty if the neuron shows none."""
    v = getattr(neuron, "v", None)
    return [v] if isinstance(v, Tensor) else []


def _trajectory(neuron: nn.Module, x: Tensor) -> list[Tensor]:
    """The membrane potential after each time step, computed again by a copy of the neuron; empty if it shows none."""
    again = copy.deepcopy(neuron)
    if not hasattr(again, "store_v_seq") or not callable(getattr(again, "reset", None)):
        return []
    again._forward_hooks.clear()
    again.backend, again.store_v_seq = "torch", True  # type: ignore[assignment]
    again.reset()  # type: ignore[operator]
    again(x)
    return list(again.v_seq)  # type: ignore[arg-type]
