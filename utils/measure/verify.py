"""Proof that a network is spike-driven: it is looked through operator by operator, and run once more by additions.

On a few samples, in float64:
1. Every operator between the input and the output is an addition, a comparison, a choice, a mask or a neuron's own
   update; or a product whose one factor are spikes of 0 and 1, which only choose what of the other is added. Every
   other operator is named.
2. With those products replaced by "look up the weights of the spikes that arrived and add them", and each BatchNorm
   folded into the layer before it, the logits are the same. The first layer takes data and stays as it is.
3. The additions that this took are as many as `exact` counts.

A number that all values are multiplied by and that then reach only a neuron, or only the output, is no product: the
threshold or the head takes it in. Each is named. Anywhere else it fails.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.errors import listed
from utils.measure.addition_run import AdditionRun
from utils.measure.origins import tensors_in
from utils.measure.proof import FollowingRun
from utils.measure.synapses import SynapseRecorder, in_single_operators, reset_neurons

# Between two orders of summation in float64; the logits are compared by the largest difference over their size.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verification:
    """What the proof found; it passed if nothing was wrong."""

    samples: int
    not_binary: list[str]  # layers after the first that take other values than 0 and 1
    unsupported: list[str]  # operators that are not known to be spike-driven, with place and reason
    logits_difference: float | None  # relative; None if the second run was not possible
    additions: dict[str, int] = field(default_factory=dict)  # done, by layer
    expected: dict[str, int] = field(default_factory=dict)  # counted by `exact`
    dense_products: int = 0  # products of the first layer, one or one per step
    absorbed: list[str] = field(default_factory=list)  # constant factors that a threshold or the output takes in
    folded: int = 0  # BatchNorms folded into the layer before them

    @property
    def miscounted(self) -> list[str]:
        names = self.additions | self.expected
        return [name for name in names if self.expected.get(name, 0) != self.additions.get(name, 0)]

    @property
    def passed(self) -> bool:
        difference = self.logits_difference
        close = difference is not None and difference <= TOLERANCE
        return close and not (self.not_binary or self.unsupported or self.miscounted)

    def lines(self) -> list[str]:
        """The findings, one per line."""
        binary = "only 0 and 1 enter every layer after the first"
        found = [(not self.not_binary, binary, f"other values than 0 and 1 enter {listed(self.not_binary)}")]
        known = "every other operator adds, compares, chooses, masks or updates a neuron"
        found += [(False, "", operator) for operator in self.unsupported] or [(True, known, "")]
        found += [(True, f"constant factor, {factor}", "") for factor in self.absorbed]
        if self.logits_difference is not None:
            text = f"run with additions alone ({self.folded} BatchNorms folded): logits differ by "
            text += f"{self.logits_difference:.1e} (relative, float64)"
            found.append((self.logits_difference <= TOLERANCE, text, text))
            text = f"{sum(self.additions.values()):,} additions done, {sum(self.expected.values()):,} counted"
            found.append((not self.miscounted, text, f"{text}; wrong in {listed(self.miscounted)}"))
        return [f"ok      {text}" if good else f"FAILED  {failure}" for good, text, failure in found]


def verify_spike_driven(model: nn.Module, batch: Tensor) -> Verification:
    """Run the proof on one batch. Slow: spikes are handled one by one. `model` is left as it is.

    The model is called as `model(x)` and returns logits or something that begins with them. SpikingJelly's neurons are
    reset before.

    Raises:
        ValueError: the model returns no tensor.
    """
    model = copy.deepcopy(model).double().eval()
    x = batch.double()
    with torch.no_grad(), _eagerly(), in_single_operators():
        with SynapseRecorder(model) as recorder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reset_neurons(model)
            _logits(model(x))
        counts = recorder.counts()
        first = FollowingRun(model)
        logits = _logits(first(x))
        unsupported = [*first.failures, *_depending_on_input(model, x, first)]
        not_binary = list(first.not_binary)
        absorbed, folded = list(first.absorbed), len(first.plan.folded_norms)
        if not_binary or unsupported:
            return Verification(counts.samples, not_binary, unsupported, None, absorbed=absorbed, folded=folded)
        second = AdditionRun(model, first.plan)
        again = _logits(second(x))
    scale = float(logits.abs().max()) or 1.0
    dense = {step.name for step in first.plan.steps.values() if step.dense}
    return Verification(
        samples=counts.samples,
        not_binary=[],
        unsupported=[],
        logits_difference=float((again - logits).abs().max()) / scale,
        additions=second.additions,
        expected={layer.name: sum(layer.synops or []) for layer in counts.layers if layer.name not in dense},
        dense_products=second.dense,
        absorbed=absorbed,
        folded=folded,
    )


def _depending_on_input(model: nn.Module, x: Tensor, first: FollowingRun) -> list[str]:
    """Constants that are none: another input gives others, so they were computed where no operator shows it."""
    other = FollowingRun(model)
    other(x.flip(-1))
    same = len(other.constants) == len(first.constants) and all(
        a == b or (a != a and b != b) for a, b in zip(other.constants, first.constants, strict=True)
    )
    return [] if same else ["numbers that depend on the input are computed outside of PyTorch"]


def _logits(output: object) -> Tensor:
    for tensor in tensors_in(output):
        return tensor
    raise ValueError(f"the model returns no tensor, but a value of type {type(output).__name__}")


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled parts as they were written, where every operator shows."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
