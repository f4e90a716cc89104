"""What each operator that is no product makes of its inputs: the rules of the proof.

A rule gives the origin of what an operator computes, and notes what is not known to be spike-driven.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.measure.addition_run import Plan
from utils.measure.ledger import Names
from utils.measure.operators import CHOICES, FACTORS, SUMS, THRESHOLDS
from utils.measure.operators import in_words as operator_name
from utils.measure.origins import CONSTANT, Made, Origin, Storages, factored, in_words, is_binary, joined
from utils.measure.synapses import named_modules, neurons_of


class ElementRules(TorchDispatchMode):
    """What is known during a run of `model`, and the rules.

    Attributes:
        failures: what is not known to be spike-driven: operator, place and reason.
        not_binary: layers that other values than 0 and 1 enter.
        absorbed: constants that a threshold, the head or the first layer takes in.
        constants: numbers that the code used, which must not depend on the input.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._modules = named_modules(model)
        self._neurons = {id(module) for module in neurons_of(model).values()}
        self._names = Names(model, self._modules)
        self.plan = Plan()
        self.failures: dict[str, None] = {}
        self.not_binary: dict[str, None] = {}
        self.absorbed: dict[str, None] = {}
        self.constants: list[float] = []
        self._origins, self._summed = Storages(), Storages()
        self._used: set[tuple[int, int]] = set()
        self._first = ""
        self._products = self._norms = self._in_neuron = 0
        self._path = ["the model"]
        self._asleep = True  # while this file computes, and not the model

    @property
    def _place(self) -> str:
        return self._path[-1]

    def _fail(self, failure: str) -> Origin:
        self.failures[failure] = None
        return Origin(Made.REAL)

    def _origin(self, tensor: Tensor) -> Origin:
        origin = self._origins.get(tensor)
        if origin is None:
            self._fail(
                f"a tensor {list(tensor.shape)} of unknown origin is used in {self._place}: computed outside of "
                "PyTorch, or kept outside of the model (register_buffer makes it a constant)"
            )
            origin = CONSTANT
            self._origins.set(tensor, origin)
        return origin

    def _use(self, origin: Origin) -> None:
        if origin.product:
            self._used.add(origin.product)

    def _absorb(self, origin: Origin, into: str) -> None:
        if origin.mixed and origin.factors:
            self._fail(f"{in_words(origin.factors)}: scales a part of what enters {into}, so it cannot be taken in")
        elif origin.factors:
            self.absorbed[f"{in_words(origin.factors)}: taken into {into}"] = None

    def _of(self, kind: str, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], output: Any) -> Origin:
        """The origin of what an operator gives, at least one of whose inputs is computed from the data."""
        floats = [one for one in inputs if one.is_floating_point()] or inputs
        origin = joined(map(self._origin, floats))
        place = self._place
        if func.namespace == "sdt":
            return self._fail(f"{operator_name(func)} in {place}: compiled code is not looked into; detach it first")
        if name == "_local_scalar_dense":
            return self._fail(f"item in {place}: reads a computed value into Python, where it cannot be followed")
        if kind in ("moved", "compared") and name != "native_dropout":
            choosing = name == "embedding" and origin.made is Made.LEARNED
            return Origin(Made.REAL) if choosing else origin
        if kind == "new":  # bernoulli: a comparison with random numbers
            self._absorb(origin, f"the draw in {place}")
            return Origin(Made.WHOLE)
        if kind == "summed":
            return origin
        if kind == "averaged":
            size = _window(name, args, inputs[0], output)
            if not size:
                return self._fail(f"{operator_name(func)} in {place}: its windows differ in size")
            return factored(origin, 1 / size, operator_name(func), place)
        base = name.rstrip("_")
        if base in SUMS:
            return self._sum(args, kwargs, place)
        if base in FACTORS and not kwargs.get("rounding_mode"):
            return self._factor(base, args, place)
        if base in THRESHOLDS:
            self._absorb(origin, f"the comparison in {place}")
            return Origin(Made.WHOLE)
        if base in CHOICES:
            return origin
        return self._fail(f"{operator_name(func)} in {place}: not known to be an addition, comparison, choice or mask")

    def _sum(self, args: Any, kwargs: Any, place: str) -> Origin:
        parts = [self._origin(one) if isinstance(one, Tensor) else CONSTANT for one in args[:2]]
        parts[1] = factored(parts[1], float(kwargs.get("alpha", 1)), "alpha of add", place)
        return joined(parts)

    def _factor(self, name: str, args: Any, place: str) -> Origin:
        both = list(args[:2])
        origins = [self._origin(one) if isinstance(one, Tensor) else CONSTANT for one in both]
        if name == "div" and origins[1].is_data:
            return self._fail(f"div in {place}: divides by a computed value")
        if all(origin.is_data for origin in origins):
            for mask, other in ((0, 1), (1, 0)):
                spikes = origins[mask].made is Made.WHOLE and not origins[mask].factors
                if spikes and is_binary(both[mask]):
                    return replace(origins[other], product=None)
            return self._fail(f"{name} in {place}: multiplies two computed values, and neither is a mask of 0 and 1")
        data = origins[0] if origins[0].is_data else origins[1]
        constant, made = (both[1], origins[1].made) if origins[0].is_data else (both[0], origins[0].made)
        if isinstance(constant, Tensor):
            if bool(((constant == 0) | (constant.abs() == 1)).all()):
                return replace(data, product=None)
            if made is Made.LEARNED:
                return self._fail(f"{name} in {place}: multiplies by a learned number")
            if bool((constant != constant.flatten()[0]).any()) and data.made is not Made.INPUT:
                return self._fail(f"{name} in {place}: multiplies each element by another number")
            constant = float(constant.double().mean())
        return factored(data, 1 / float(constant) if name == "div" else float(constant), name, place)


def _window(name: str, args: Any, x: Tensor, output: Any) -> int:
    """How many values each average is of; 0 where they differ."""
    if name == "mean":
        return x.numel() // max(1, output.numel())
    if "adaptive" in name:
        sizes = [(n, int(m)) for n, m in zip(x.shape[2:], output.shape[2:], strict=True)]
        return 0 if any(n % m for n, m in sizes) else math.prod(n // m for n, m in sizes)
    dims = 2 if "2d" in name else 3
    defaults = (None, None, (), 0, False, True, None)
    kernel, _, padding, ceil, counts_padding, divisor = (*args, *defaults[len(args) :])[1:7]
    kernel = [kernel] * dims if isinstance(kernel, int) else list(kernel) * (dims // len(kernel))
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding
    if ceil or (padded and not counts_padding):
        return 0
    return int(divisor or math.prod(kernel))
