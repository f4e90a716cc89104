"""Counts what enters every convolution, linear layer and other product, from outside the model, in integers.

A recorder attaches forward hooks to any `nn.Module` and sees each operator that it runs. It keeps a few integers per
layer, time step and sample; nothing of a batch stays alive after it. It works for multi-step networks (tensors
`[T, B, ...]` or `[T*B, ...]`) and for single-step ones (layers called once per time step), with SpikingJelly's neurons
or others with a `v_threshold`.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.measure.ledger import Ledger
from utils.measure.spike_values import ADDITIONS, MAGNITUDE, NONZERO, OPERATIONS
from utils.measure.synapse_counts import (
    COUNTED,
    Call,
    Counts,
    LayerCount,
    count_elements,
    count_layer,
)
from utils.measure.totals import OF_SAMPLES, Total, sum_totals
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, Recorder, hooked

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _is_neuron(module: nn.Module) -> bool:
    # A model with SpikingJelly's neurons has imported it; importing it here would cost others seconds.
    spikingjelly = sys.modules.get("spikingjelly.activation_based.neuron")
    return isinstance(module, getattr(spikingjelly, "BaseNode", ())) or hasattr(module, "v_threshold")


def neurons_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> spiking neuron layer: SpikingJelly's, and modules with a `v_threshold` that contain no other such."""
    return {
        name: module
        for name, module in named_modules(model).items()
        if _is_neuron(module) and sum(map(_is_neuron, module.modules())) == 1
    }


def reset_neurons(model: nn.Module) -> None:
    """Let SpikingJelly's neurons, and its other modules with a state, forget the samples before."""
    base = sys.modules.get("spikingjelly.activation_based.base")
    for module in model.modules():
        if isinstance(module, getattr(base, "MemoryModule", ())):
            module.reset()  # type: ignore[operator]


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module; the model itself under the name of its class."""
    return {name or type(module).__name__: module for name, module in model.named_modules()}


class SynapseRecorder(Recorder):
    """Counts the values that enter the Conv and Linear layers and other products of `model` while it is entered.

    A batch is one call of `model`. Where a script loops over time itself, it marks the batch:
    `with recorder.batch(): [model(x[t]) for t in range(T)]`.

    Args:
        model: any module; its neurons tell the number of time steps.
        exact: also count the operations really needed, `utils.measure.synapse_counts.count_layer`.
        sums: name -> module whose output's non-zero elements the model adds up without weights.
        timed: further modules whose outputs `[T, B, ...]` tell the number of time steps.

    Raises:
        ValueError: in a batch whose number of time steps differs from those before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        exact: bool = True,
        sums: Mapping[str, nn.Module] | None = None,
        timed: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._model = model
        self._exact = exact
        named = named_modules(model)
        self._layers = {name: m for name, m in named.items() if isinstance(m, COUNTED)}
        self._neurons = neurons_of(model)
        self._norms = {name: m for name, m in named.items() if isinstance(m, _NORMS)}
        self._sums = dict(sums or {})
        self._timed = {name: m for name, m in (timed or {}).items() if m not in self._neurons.values()}
        self._ledger = Ledger(model, named, exact, self._note_product, self._note_unpriced)
        # Over all batches.
        self._steps = self._samples = 0
        self._totals: dict[str, Total] = {}
        self._products: dict[str, tuple[str, int]] = {}  # type and weights of products that no layer shows
        self._unpriced: dict[str, None] = {}  # operators, in the order in which they were seen
        # Of the batch that is running.
        self._marked = False
        self._start()

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with (
            contextlib.ExitStack() as around,
            hooked(self._sums, self._sum_hook),
            hooked(self._neurons | self._timed, self._time_hook),
            hooked(self._neurons | self._norms, self._size_hook),
            in_single_operators(),
            self._ledger,
        ):
            around.callback(self._start)
            # First: where the model itself is counted, the batch begins before its own hook.
            around.callback(self._model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            for name, module in (self._layers | self._neurons).items():
                around.callback(module.register_forward_pre_hook(self._enter).remove)
                around.callback(module.register_forward_hook(self._leave(name), with_kwargs=True).remove)
            # Last: and it ends after it.
            around.callback(self._model.register_forward_hook(self._after).remove)
            yield

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Take all calls of the model inside as one batch."""
        self._start()
        self._marked = True
        try:
            yield
            self._finish()
        finally:
            self._marked = False
            self._start()

    # Shapes are read in the hooks; counts stay on the device, because reading them would make the host wait for it.

    def _start(self) -> None:
        self._multi: list[tuple[int, int]] = []  # (T, B) of each multi-step neuron call
        self._single: Counter[str] = Counter()  # calls of each single-step neuron
        self._batch_size = 0
        self._calls: dict[str, list[Call]] = {}
        self._ledger.start()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._marked:
            self._start()
        given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim())
        self._batch_size = self._batch_size or next(map(len, given), 0)
        self._ledger.running = True

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ledger.running = False
        if not self._marked:
            self._finish()
            self._start()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, COUNTED):
            self._ledger.inside += 1
        else:
            self._ledger.in_neuron += 1

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(module, COUNTED):
                x = args[0] if args else kwargs["input"]
                self._calls.setdefault(name, []).append(count_layer(module, x.detach(), output, self._exact))
                self._ledger.inside -= 1
            else:
                self._ledger.in_neuron -= 1

        return leave

    def _note_product(self, name: str, kind: str, call: Call, weights: int) -> None:
        self._products[name] = kind, weights
        self._calls.setdefault(name, []).append(call)

    def _note_unpriced(self, operator: str) -> None:
        self._unpriced[operator] = None

    def _sum_hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls.setdefault(name, []).append(count_elements(output))

        return count

    def _time_hook(self, name: str) -> ForwardHook:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() < 2:
                return
            if getattr(module, "step_mode", "m") == "m":
                self._multi.append((output.shape[0], output.shape[1]))
            else:
                self._single[name] += 1
                self._batch_size = output.shape[0]

        return note

    def _size_hook(self, name: str) -> ForwardHook:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._calls.setdefault(name, []).append(Call(None, 0, 0, output.numel()))

        return note

    def _time(self) -> tuple[int, int]:
        """T and B of the batch that just ended."""
        if not self._multi:
            return max(self._single.values(), default=1), self._batch_size
        # A neuron may act on something without time; most of them do not.
        ((steps, _),) = Counter(T for T, _ in self._multi).most_common(1)
        batches, size = {B for _, B in self._multi}, self._batch_size
        # Samples may be split into windows, never joined. An input with time first has T where others have B.
        if size in batches or (size not in (0, steps) and not any(B % size for B in batches)):
            return steps, size
        return steps, min(batches)

    def _finish(self) -> None:
        T, B = self._time()
        if self._steps and self._steps != T:
            raise ValueError(f"this batch has {T} time steps, those before {self._steps}")
        self._steps = T
        self._samples += B
        stepwise = bool(self._single) and not self._multi
        for name, calls in self._calls.items():
            self._totals.setdefault(name, Total()).add(calls, T, B, stepwise)

    def counts(self, process: Process | None = None) -> Counts:
        """Everything counted so far, summed over all processes (each must call this).

        Raises:
            ValueError: nothing was counted.
        """
        process = process or Process(0, 1, torch.device("cpu"))
        with_data, steps, samples = map(int, process.sum(self._samples > 0, self._steps, self._samples))
        if not with_data:
            raise ValueError("nothing was counted: the model was not called while the recorder was entered")
        T = steps // with_data  # the same in every process that had samples
        totals = sum_totals(self._totals, process)
        seen = process.gather_objects((self._products, list(self._unpriced)))
        self._products = {name: kind for products, _ in seen for name, kind in products.items()}
        called = [name for name, total in totals.items() if total.steps]
        first = next((name for name in called if name not in self._sums), "")
        rows = {name: self._layer(name, totals[name], samples, name == first) for name in called}
        outputs = {name: total.per_sample(2, T * samples) for name, total in totals.items()}
        return Counts(
            layers=[row for name, row in rows.items() if name not in self._sums],
            sums=[row for name, row in rows.items() if name in self._sums],
            neurons_per_step={name: outputs[name] for name in self._neurons if outputs.get(name)},
            norms_per_step={name: n for name, n in outputs.items() if name in self._norms and n},
            time_steps=T,
            samples=samples,
            order=called,
            never_called=[name for name in self._layers if name not in rows],
            unpriced=list(dict.fromkeys(operator for _, found in seen for operator in found)),
            by_sample=_by_sample([rows[name] for name in called], [totals[name] for name in called], samples),
        )

    def _layer(self, name: str, total: Total, samples: int, takes_data: bool) -> LayerCount:
        module = self._layers.get(name)
        kind, weights = self._products.get(name, ("sum", 0))
        if module is not None:
            kind, weights = type(module).__name__, sum(p.numel() for p in module.parameters(recurse=False))
        values, counts = total.values, total.counts.tolist()
        if takes_data and values.kind != "binary":
            values = replace(values, kind="real")  # pixels and counts of events are data, not spikes
        macs, inputs, outputs = (total.per_sample(size, samples * total.steps) for size in range(3))
        # A sum adds a number whatever its value; a weight is added as often as a whole number of spikes says.
        repeated = values.kind == "integer" and name not in self._sums
        return LayerCount(
            name=name,
            type=kind,
            samples=samples,
            macs_per_step=macs,
            inputs_per_step=inputs,
            outputs_per_step=outputs,
            weights=weights,
            nonzero=counts[NONZERO],
            synops=counts[ADDITIONS if repeated else OPERATIONS] if self._exact or name in self._sums else None,
            values=values,
            repeated=counts[MAGNITUDE] if repeated else None,
        )


def _by_sample(rows: list[LayerCount], totals: list[Total], samples: int) -> Tensor | None:
    """Operations of each layer and sample, `[layers, samples]`; None where shapes do not tell the sample."""
    found = []
    for row, total in zip(rows, totals, strict=True):
        if row.synops is None or total.samples is None or total.samples[0].shape[1] != samples:
            return None
        found.append(total.samples[0][OF_SAMPLES.index(OPERATIONS if row.repeated is None else ADDITIONS)])
    return torch.stack(found) if found else None


@contextlib.contextmanager
def in_single_operators() -> Iterator[None]:
    """Let `nn.MultiheadAttention` and the layers around it run operator by operator, not as one that hides them all."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
