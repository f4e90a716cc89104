"""A run of a network in which every operator is looked at.

It follows where the values of each tensor come from (`utils.measure.origins`), names what is neither addition nor
comparison, choice or mask, and plans how each product can be computed by additions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.measure.addition_run import Step
from utils.measure.operators import ATTENTION, MATRIX_PRODUCTS, RECURRENT, THRESHOLDS, role
from utils.measure.operators import in_words as operator_name
from utils.measure.origins import CONSTANT, Made, Origin, in_words, is_binary, is_whole, joined, tensors_in
from utils.measure.proof_rules import ElementRules
from utils.measure.synapse_counts import COUNTED
from utils.measure.synapses import reset_neurons

_COPIES = {"clone", "_to_copy", "_unsafe_view", "contiguous"}
_FOLDABLE_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}


class FollowingRun(ElementRules):
    """A run of `model` that follows where values come from, and fills `plan`."""

    def __call__(self, x: Tensor) -> Any:
        """Run the model on `x`; its output."""
        for module in self._model.modules():
            for tensor in tensors_in(list(vars(module).values())):  # buffers among them
                self._origins.set(tensor, CONSTANT)
        for parameter in self._model.parameters():
            self._origins.set(parameter, Origin(Made.LEARNED))
        self._origins.set(x, Origin(Made.INPUT))
        reset_neurons(self._model)
        with self._hooks(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with self:
                self._asleep = False
                output = self._model(x)
                self._asleep = True
        for origin in map(self._origin, tensors_in(output)):
            self._use(origin)
            if origin.factors:
                self.absorbed[f"{in_words(origin.factors)}: feeds only the output"] = None
        self._check_folds()
        return output

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                before, after = self._before(name), self._after(name)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            yield

    def _before(self, name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._path.append(name)
            if id(module) in self._neurons:
                if not self._in_neuron:
                    for origin in map(self._origin, tensors_in([*args, *kwargs.values()])):
                        self._absorb(origin, f"the threshold of {name}")
                self._in_neuron += 1

        return before

    def _after(self, name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._path.pop()
            if id(module) not in self._neurons:
                return
            self._in_neuron -= 1
            if self._in_neuron:
                return
            for tensor in tensors_in(output):
                self._asleep = True
                whole = is_whole(tensor)
                self._asleep = False
                self._origins.set(tensor, Origin(Made.WHOLE if whole else Made.REAL))
                if not whole and not _gives_potentials(module):
                    self._fail(f"{name} is taken for a neuron, but gives real values")

        return after

    # Every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._asleep:
            return func(*args, **kwargs)
        kind = role(func)
        if kind == "product":
            return self._product(func, args, kwargs)
        if kind == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        output = func(*args, **kwargs)
        if kind != "view":
            self._follow(kind, func, args, kwargs, output)
        return output

    def _follow(self, kind: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = func.overloadpacket.__name__
        inputs = list(tensors_in([*args, *kwargs.values()])) if kind != "new" or name == "bernoulli" else []
        origins = [self._origin(tensor) for tensor in inputs]
        if name in _COPIES and len(origins) == 1:
            origin = origins[0]
        else:
            for one in origins:
                self._use(one)
            if not any(one.is_data for one in origins):
                origin = joined(origins)
            elif self._in_neuron and kind in ("elementwise", "moved", "new", "compared"):
                # A neuron may do to each of its values what it likes; what it gives is looked at in the end.
                origin = Origin(Made.WHOLE if name.rstrip("_") in THRESHOLDS else Made.REAL)
            else:
                origin = self._of(kind, name, func, args, kwargs, inputs, output)
        if not self._in_neuron:
            numbers = [a for a in (*args, *kwargs.values()) if type(a) is float] if kind == "elementwise" else []
            self.constants += args[0].flatten().tolist() if name == "lift_fresh" else numbers
        written = func._schema.is_mutable
        for tensor in tensors_in(output):
            self._set(tensor, origin, written)

    def _set(self, tensor: Tensor, origin: Origin, written: bool) -> None:
        if origin.is_data and not tensor.is_floating_point():
            origin = Origin(Made.WHOLE)
        storage = tensor.untyped_storage()
        known = self._origins.get(tensor)
        if written and known and tensor.numel() * tensor.element_size() < storage.nbytes():
            origin = joined([known, origin])  # other parts of the storage stay what they were
        self._origins.set(tensor, origin)

    # Products

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        number, self._products = self._products, self._products + 1
        name = func.overloadpacket.__name__
        places = MATRIX_PRODUCTS.get(name, (0, 1))
        output = func(*args, **kwargs)
        origins = [self._origin(one) for one in tensors_in([*args, *kwargs.values()])]
        for one in origins:
            self._use(one)
        made = self._of_product(number, name, func, args, kwargs, places, output)
        for tensor in tensors_in(output):
            self._origins.set(tensor, made if any(one.is_data for one in origins) else joined(origins))
        return output

    def _of_product(
        self, number: int, name: str, func: Any, args: Any, kwargs: Any, places: tuple[int, int], output: Any
    ) -> Origin:
        place = self._place
        if name in RECURRENT or name.startswith(ATTENTION):
            return self._fail(f"{operator_name(func)} in {place}: multiplies computed values with each other")
        if any(kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
            return self._fail(f"{operator_name(func)} in {place}: scales by alpha or beta")
        factors = [args[one] for one in places]
        origins = [self._origin(one) for one in factors]
        added = args[2] if name == "convolution" else args[0] if places[0] else None
        rest = self._origin(added) if added is not None else CONSTANT
        if all(one.is_data for one in origins):
            return joined([self._select(number, name, func, factors, origins, output), *[rest] * rest.is_data])
        if not any(one.is_data for one in origins):
            return rest
        chosen = int(origins[1].is_data)
        layer = self._layer(factors[1 - chosen], func)
        self._enter(number, layer, factors[chosen], origins[chosen], chosen)
        return joined([Origin(Made.REAL), rest]) if rest.is_data else Origin(Made.REAL, product=(number, 0))

    def _layer(self, weight: Tensor, func: Any) -> str:
        module = self._modules.get(self._place)
        if isinstance(module, COUNTED):
            return self._place
        return self._names.of_weight(weight) or self._names.of_product(operator_name(func), *self._names.place())

    def _enter(self, number: int, layer: str, x: Tensor, origin: Origin, chosen: int) -> None:
        """Values enter a layer with weights."""
        dense = False
        if origin.made is Made.INPUT:
            self._first = self._first or layer
            dense = layer == self._first
            if origin.factors:
                self.absorbed[f"{in_words(origin.factors)}: taken into the weights of {layer}, the first layer"] = None
            if not dense and not is_binary(x):
                self.not_binary[layer] = None
                self._fail(f"the input enters a second layer, {layer}")
        elif origin.factors:
            self.not_binary[layer] = None
            self._fail(f"{in_words(origin.factors)}: scales what enters {layer}")
        elif origin.made is Made.REAL or not is_binary(x):
            self.not_binary[layer] = None
        self.plan.steps[number] = Step(layer, dense, chosen)

    def _select(
        self, number: int, name: str, func: Any, factors: list[Tensor], origins: list[Origin], output: Any
    ) -> Origin:
        """Spikes choose among computed values, as in attention: they are added, as they are."""
        if name != "convolution":
            for chosen, other in ((0, 1), (1, 0)):
                spikes = origins[chosen].made is Made.WHOLE and not origins[chosen].factors
                if spikes and is_binary(factors[chosen]):
                    sums = any(self._summed.get(one) for one in factors)
                    label = self._names.of_product(operator_name(func), *self._names.place())
                    self.plan.steps[number] = Step(label, False, chosen, pairs=not sums)
                    self._summed.set(output, CONSTANT)
                    made = origins[other].made
                    return replace(origins[other], made=min(made, Made.REAL), product=None)
        return self._fail(
            f"{operator_name(func)} in {self._place}: multiplies two computed tensors, and neither holds spikes"
        )

    # BatchNorm

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        number, self._norms = self._norms, self._norms + 1
        output = func(*args, **kwargs)
        origin = self._origin(args[0])
        origin = self._fold(number, func, args, origin) if origin.is_data else origin
        for tensor in tensors_in(output):
            self._origins.set(tensor, origin)
        return output

    def _fold(self, number: int, func: Any, args: Any, origin: Origin) -> Origin:
        place = self._place
        if func.overloadpacket.__name__ not in _FOLDABLE_NORMS or args[5]:
            return self._fail(f"{operator_name(func)} in {place}: normalises by the values themselves")
        step = self.plan.steps.get(origin.product[0]) if origin.product else None
        if origin.product is None or step is None or len(step.folds) != origin.product[1]:
            self._use(origin)
            return self._fail(
                f"batch_norm in {place}: multiplies values, since it does not directly follow the convolution or "
                "linear layer that it could be folded into"
            )
        _, weight, bias, mean, variance, _, _, eps = args[:8]
        scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
        step.folds.append((scale, (0 if bias is None else bias) - mean * scale))
        self.plan.folded_norms.add(number)
        return Origin(Made.REAL, product=(origin.product[0], origin.product[1] + 1))

    def _check_folds(self) -> None:
        for number, done in sorted(self._used):
            step = self.plan.steps.get(number)
            if step is not None and done < len(step.folds):
                self._fail(f"batch_norm after {step.name}: cannot be folded, what enters it is used elsewhere too")


def _gives_potentials(module: nn.Module) -> bool:
    """Whether a neuron is one of SpikingJelly's that give their membrane potential, for a network's output."""
    neuron = sys.modules.get("spikingjelly.activation_based.neuron")
    return isinstance(module, getattr(neuron, "NonSpikingBaseNode", ()))
