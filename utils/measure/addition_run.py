"""A run of a network in which layers add the weights of the spikes that arrive, with BatchNorm folded into them.

Legend: b matrices, each M x K times K x N.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.measure.additions import add_conv, add_rows
from utils.measure.geometry import Geometry
from utils.measure.operators import MATRIX_PRODUCTS, role
from utils.measure.synapses import reset_neurons


@dataclass
class Step:
    """How a product is to be computed: `dense` as written, else by adding what the spikes of one factor choose."""

    name: str
    dense: bool
    chosen: int  # which of the two factors holds the spikes, 0 or 1
    pairs: bool = False  # spikes choose spikes
    folds: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # scale and shift of each channel

    def fold(self) -> tuple[Tensor, Tensor]:
        """All of `folds` in one: scale and shift."""
        scale, shift = torch.ones(()), torch.zeros(())
        for one, moved in self.folds:
            scale, shift = scale * one, shift * one + moved
        return scale, shift


@dataclass
class Plan:
    """What is known of a run, by number of the product or BatchNorm in the order in which they run."""

    steps: dict[int, Step] = field(default_factory=dict)
    folded_norms: set[int] = field(default_factory=set)


class AdditionRun(TorchDispatchMode):
    """Runs `model` by `plan`.

    Attributes:
        additions: done, by layer.
        dense: products of the first layer, which were computed as they are written.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self._model, self._plan = model, plan
        self._products = self._norms = 0
        self.additions: dict[str, int] = {}
        self.dense = 0

    def __call__(self, x: Tensor) -> Any:
        """Run the model on `x`; its output."""
        reset_neurons(self._model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with self:
                return self._model(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = role(func)
        if kind == "batch_norm":
            self._norms += 1
            if self._norms - 1 in self._plan.folded_norms:
                empty = args[0].new_empty(0)
                return args[0].clone(), *[empty] * (len(func._schema.returns) - 1)
        elif kind == "product":
            self._products += 1
            if step := self._plan.steps.get(self._products - 1):
                self.dense += step.dense
                name = func.overloadpacket.__name__
                return self._convolve(step, func, args) if name == "convolution" else self._multiply(step, name, args)
        return func(*args, **(kwargs or {}))

    def _convolve(self, step: Step, func: Any, args: Any) -> Tensor:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        if step.folds:
            scale, shift = step.fold()
            if transposed:  # [C, C' / groups, ...]
                by_group = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
                weight = (weight.unflatten(0, (groups, -1)) * by_group).flatten(0, 1)
            else:  # [C', C / groups, ...]
                weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
        if step.dense:
            return func(x, weight, bias, *args[3:])
        moves = tuple(stride), tuple(padding), tuple(dilation)
        geometry = Geometry(tuple(weight.shape[2:]), *moves, groups, "zeros", transposed, tuple(output_padding))
        y = self._noted(step, add_conv(x, weight, geometry))
        return y if bias is None else y + bias.view(-1, *[1] * (y.dim() - 2))

    def _multiply(self, step: Step, name: str, args: Any) -> Tensor:
        places = MATRIX_PRODUCTS[name]
        factors = [args[place] for place in places]
        scale, shift = step.fold()
        if step.chosen:  # weights on the left: the channels of the output are the rows
            scale, shift = (one.reshape(-1, 1) for one in (scale, shift))
        if step.folds:
            factors[1 - step.chosen] = factors[1 - step.chosen] * scale
        first = factors[0].unsqueeze(0) if factors[0].dim() < 2 else factors[0]
        second = factors[1].unsqueeze(1) if factors[1].dim() < 2 else factors[1]
        first, second = (one if one.dim() == 3 else one.unsqueeze(0) for one in (first, second))
        if step.dense:
            y = first @ second
        elif step.chosen:
            y = self._noted(step, add_rows(second.transpose(1, 2), first.transpose(1, 2), step.pairs)).transpose(1, 2)
        else:
            y = self._noted(step, add_rows(first, second, step.pairs))
        y = y.reshape(*factors[0].shape[:-1], *(factors[1].shape[-1:] if factors[1].dim() > 1 else ()))
        if places[0]:  # addmm and others: something is added to the product
            y = y + args[0] * scale
        return y + shift if step.folds else y

    def _noted(self, step: Step, done: tuple[Tensor, int]) -> Tensor:
        self.additions[step.name] = self.additions.get(step.name, 0) + done[1]
        return done[0]
