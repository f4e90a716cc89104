"""Counts what enters every convolution and linear layer, from outside the model, in integers.

A recorder attaches forward hooks to any `nn.Module` and keeps a few integers per layer and time step; nothing of a
batch stays alive after it. It works for multi-step networks (tensors `[T, B, ...]` or `[T*B, ...]`) and for
single-step ones (layers called once per time step), with SpikingJelly's neurons or others with a `v_threshold`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.measure.synapse_counts import (
    COUNTED,
    Call,
    Counts,
    LayerCount,
    SumCount,
    count_layer,
    count_values,
    per_step,
)
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, Recorder, hooked

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_neuron(module: nn.Module) -> bool:
    """Whether `module` is a spiking neuron layer: one of SpikingJelly's, or any with a firing threshold."""
    # A model with SpikingJelly's neurons has imported it; importing it here would cost others seconds.
    spikingjelly = sys.modules.get("spikingjelly.activation_based.neuron")
    return isinstance(module, getattr(spikingjelly, "BaseNode", ())) or hasattr(module, "v_threshold")


class _Sizes:
    """Sizes of one module over all batches: totals over samples and steps."""

    def __init__(self) -> None:
        self.macs = self.inputs = self.outputs = 0

    def add(self, call: Call) -> None:
        self.macs += call.macs
        self.inputs += call.inputs
        self.outputs += call.outputs


class SynapseRecorder(Recorder):
    """Counts the values that enter the Conv and Linear layers of `model` while it is entered.

    A batch is one call of `model`. Where a script loops over time itself, it marks the batch:
    `with recorder.batch(): [model(x[t]) for t in range(T)]`.

    Args:
        model: any module; its neurons tell the number of time steps.
        exact: also count the operations really needed, `utils.measure.synapse_counts.count_layer`.
        sums: name -> module whose output's non-zero elements the model adds up without weights.

    Raises:
        ValueError: in a batch whose number of time steps differs, or whose layers do not tell their time step.
    """

    def __init__(self, model: nn.Module, *, exact: bool = True, sums: Mapping[str, nn.Module] | None = None) -> None:
        self._model = model
        self._exact = exact
        named = [(name or type(m).__name__, m) for name, m in model.named_modules()]
        self._layers = {name: m for name, m in named if isinstance(m, COUNTED)}
        self._neurons = {name: m for name, m in named if is_neuron(m)}
        self._norms = {name: m for name, m in named if isinstance(m, _NORMS)}
        self._sums = dict(sums or {})
        self._uncounted = [
            f"{name} ({type(m).__name__})"
            for name, m in named
            if not isinstance(m, COUNTED) and any(p.dim() > 1 for p in m.parameters(recurse=False))
        ]
        # Over all batches. Counts are [2, steps]: non-zero inputs, operations.
        self._steps = self._samples = 0
        self._counts: dict[str, Tensor] = {}
        self._ones: dict[str, Tensor] = {}
        self._sizes: dict[str, _Sizes] = {}
        # Of the batch that is running.
        self._marked = False
        self._start()

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with (
            hooked(self._layers, self._layer_hook),
            hooked(self._sums, self._sum_hook),
            hooked(self._neurons, self._neuron_hook),
            hooked(self._norms, self._size_hook),
            contextlib.ExitStack() as around,
        ):
            around.callback(self._start)
            around.callback(self._model.register_forward_pre_hook(self._before).remove)
            # Last: where the model itself is counted, its own hook comes before the end of the batch.
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

    def counts(self, process: Process | None = None) -> Counts:
        """Everything counted so far, summed over all processes (each must call this).

        Raises:
            ValueError: nothing was counted, or sizes differ between samples.
        """
        return _collect(self, process or Process(0, 1, torch.device("cpu")))

    # Shapes are read in the hooks; counts stay on the device, because reading them would make the host wait for it.

    def _start(self) -> None:
        self._multi: list[tuple[int, int]] = []  # (T, B) of each multi-step neuron call
        self._single: dict[str, int] = {}  # calls of each single-step neuron
        self._batch_size = 0
        self._calls: dict[str, list[Call]] = {}
        self._batch_ones: dict[str, Tensor] = {}

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._marked:
            self._start()
        self._batch_size = self._batch_size or next((len(a) for a in args if isinstance(a, Tensor)), 0)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._marked:
            self._finish()
            self._start()

    def _layer_hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            call, ones = count_layer(module, args[0].detach(), output, self._exact)
            self._calls.setdefault(name, []).append(call)
            self._batch_ones[name] = self._batch_ones[name] + ones if name in self._batch_ones else ones

        return count

    def _sum_hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            nonzero, _, _ = count_values(output.detach().flatten(0, 1))
            counts = torch.stack([nonzero, nonzero]).view(2, *output.shape[:2])  # [2, T, B]
            self._calls.setdefault(f"sum {name}", []).append(Call(counts, 0, output.numel(), 0))

        return count

    def _neuron_hook(self, name: str) -> ForwardHook:
        size = self._size_hook(name)

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            size(module, args, output)
            if getattr(module, "step_mode", "m") == "m":
                self._multi.append((output.shape[0], output.shape[1]))
            else:
                self._single[name] = self._single.get(name, 0) + 1
                self._batch_size = output.shape[0]

        return note

    def _size_hook(self, name: str) -> ForwardHook:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls.setdefault(name, []).append(Call(output.new_empty(0), 0, 0, output.numel()))

        return note

    def _time(self) -> tuple[int, int]:
        """T and B of the batch that just ended."""
        if self._multi:
            found = {steps for steps, _ in self._multi}
            if len(found) > 1:
                raise ValueError(f"the neurons disagree on the number of time steps: {sorted(found)}")
            return found.pop(), min(batch for _, batch in self._multi)
        return max(self._single.values(), default=1), self._batch_size

    def _finish(self) -> None:
        T, B = self._time()
        if self._steps and self._steps != T:
            raise ValueError(f"this batch has {T} time steps, those before {self._steps}")
        self._steps = T
        self._samples += B
        stepwise = bool(self._single) and not self._multi
        for name, calls in self._calls.items():
            sizes = self._sizes.setdefault(name, _Sizes())
            for call in calls:
                sizes.add(call)
            if name not in self._neurons and name not in self._norms:
                self._add(self._counts, name, per_step(name, calls, T, B, stepwise))
        for name, ones in self._batch_ones.items():
            self._add(self._ones, name, ones)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, counts: Tensor) -> None:
        if name in sums and sums[name].shape != counts.shape:
            raise ValueError(f"{name} ran for {counts.shape[-1]} time steps, in batches before for another number")
        sums[name] = sums[name] + counts if name in sums else counts


def _collect(recorder: SynapseRecorder, process: Process) -> Counts:
    """Sum over processes. A process without samples takes part with zeros."""
    names = [*recorder._layers, *(f"sum {name}" for name in recorder._sums)]
    sized = [*names, *recorder._neurons, *recorder._norms]
    has_data = int(recorder._samples > 0)
    head = [has_data, recorder._steps, recorder._samples]
    head += [recorder._counts[name].shape[1] if name in recorder._counts else 0 for name in names]
    with_data, step_sum, samples, *steps_sums = map(int, process.sum(*head))
    if not with_data:
        raise ValueError("nothing was counted: the model was not called while the recorder was entered")
    # Every process with data has the same numbers of steps, so that the sums are multiples of them.
    steps = dict(zip(names, (total // with_data for total in steps_sums), strict=True))

    flat: list[Tensor] = []
    for name in names:
        counts = recorder._counts.get(name)
        flat.append(torch.zeros(2 * steps[name], dtype=torch.int64) if counts is None else counts.flatten().cpu())
    none = torch.zeros((), dtype=torch.int64)
    flat += [recorder._ones.get(name, none).reshape(1).cpu() for name in recorder._layers]
    for name in sized:
        size = recorder._sizes.get(name, _Sizes())
        flat.append(torch.tensor([size.macs, size.inputs, size.outputs]))
    summed = process.sum_tensor(torch.cat(flat))
    lengths = [2 * steps[name] for name in names] + [1] * len(recorder._layers) + [3] * len(sized)
    parts = iter(summed.split(lengths))
    counts_of = {name: next(parts).view(2, -1).tolist() for name in names}
    ones_of = {name: int(next(parts)) for name in recorder._layers}
    sizes_of = {name: next(parts).tolist() for name in sized}
    T = step_sum // with_data

    def per_sample(name: str, total: int, ran: int) -> int:
        value, rest = divmod(total, samples * ran)
        if rest:
            raise ValueError(
                f"{name}: the sizes of its tensors differ between samples, so there is no count per sample"
            )
        return value

    def layer(name: str) -> LayerCount:
        nonzero, synops = counts_of[name]
        macs, inputs, outputs = (per_sample(name, total, steps[name]) for total in sizes_of[name])
        module = recorder._layers[name]
        return LayerCount(
            name=name,
            type=type(module).__name__,
            is_binary=ones_of[name] == sum(nonzero),
            samples=samples,
            macs_per_step=macs,
            inputs_per_step=inputs,
            outputs_per_step=outputs,
            weights=sum(p.numel() for p in module.parameters(recurse=False)),
            nonzero=nonzero,
            synops=synops if recorder._exact else None,
        )

    called = [name for name in names if steps[name]]
    order = {name: place for place, name in enumerate(recorder._sizes)}
    called.sort(key=lambda name: order.get(name, len(order)))
    return Counts(
        layers=[layer(name) for name in called if name in recorder._layers],
        sums=[
            SumCount(
                name.removeprefix("sum "),
                samples,
                per_sample(name, sizes_of[name][1], steps[name]),
                counts_of[name][0],
            )
            for name in called
            if name not in recorder._layers
        ],
        neurons_per_step={n: per_sample(n, sizes_of[n][2], T) for n in recorder._neurons if sizes_of[n][2]},
        norms_per_step={n: per_sample(n, sizes_of[n][2], T) for n in recorder._norms if sizes_of[n][2]},
        time_steps=T,
        samples=samples,
        order=[name.removeprefix("sum ") for name in called],
        never_called=[name for name in recorder._layers if not steps[name]],
        uncounted=recorder._uncounted,
    )
