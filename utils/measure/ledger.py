"""Sees every operator that a network runs, and counts the products that no Conv or Linear layer shows.

Functional convolutions and linear layers, `@`, `bmm`, `einsum`, attention by any function, transposed convolutions,
recurrent layers and `nn.MultiheadAttention` all end in a few operators, and these are what is counted. What may
multiply and is none of them is named, because a total without it is not complete.

Legend: b matrices, each M x K times K x N.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from utils.measure.geometry import Geometry
from utils.measure.operators import ATTENTION, MATRIX_PRODUCTS, RECURRENT, in_words, role, steps_of_recurrence
from utils.measure.synapse_counts import COUNTED, Call, count_conv, count_dense, count_rows, count_selected

# These put the sequence before the samples inside, also where their inputs have it after them.
_SEQUENCE_FIRST = (nn.MultiheadAttention, nn.RNNBase)
# Called with name, type, counts and number of weights of a product.
Record = Callable[[str, str, Call, int], None]


class Names:
    """How products are called: by their weights, or by the module in whose code two computed tensors are multiplied.

    Args:
        modules: name -> module, all of `model`.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._paths = {id(module): name for name, module in modules.items()}
        self._weights: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if name == "weight" and isinstance(model, COUNTED):
                name = self._paths[id(model)]
            self._weights[parameter.untyped_storage()._cdata] = name.removesuffix(".weight")
        self._sites: dict[tuple[Any, ...], str] = {}  # place in the code -> name of the product
        self.start()

    def start(self) -> None:
        """Forget the copies of weights."""
        self._copies: dict[int, tuple[str, StorageWeakRef]] = {}

    def note_copy(self, weight: Tensor, copy: Tensor) -> None:
        """`copy` has the values of `weight`, in another type."""
        storage = copy.untyped_storage()
        self._copies[storage._cdata] = self.of_weight(weight), StorageWeakRef(storage)

    def of_weight(self, tensor: Tensor) -> str:
        """The name of the parameter that `tensor` shows or is a copy of; empty for a computed one."""
        address = tensor.untyped_storage()._cdata
        name, _ = self._copies.get(address, ("", None))
        return name or self._weights.get(address, "")

    def of_product(self, operator: str, place: str, site: tuple[Any, ...]) -> str:
        """The name of a product of computed tensors: further ones of the same module have a number."""
        key = operator, site
        if key not in self._sites:
            name, number = f"{place}: {operator}", 1
            while name in self._sites.values():
                number += 1
                name = f"{place}: {operator} {number}"
            self._sites[key] = name
        return self._sites[key]

    def place(self) -> tuple[str, tuple[Any, ...]]:
        """The module in whose code the operator is called, and where in the code that is."""
        frame, site = sys._getframe(1), []
        while frame is not None:
            owner = frame.f_locals.get("self")
            site.append((frame.f_code, frame.f_lasti))
            if isinstance(owner, nn.Module) and id(owner) in self._paths:
                name = self._paths[id(owner)]
                return name, (name, *site)
            frame = frame.f_back  # type: ignore[assignment]
        return "the model", tuple(site)


class Ledger(TorchDispatchMode):
    """Reports the products of a model while it is entered and `running`.

    Attributes:
        running: whether what runs belongs to the model.
        inside: how many layers that are counted elsewhere the call is in.
        in_neuron: the same for neurons, whose own updates have no price.

    Args:
        paths: name -> module, all of `model`.
        exact: also count the operations really needed.
        record: called for each product. A product with weights has the name of their layer or parameter; one of two
            computed tensors has that of the module that asks for it, with the operator.
        unpriced: called with an operator that may multiply and has no price, and its place.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: dict[str, nn.Module],
        exact: bool,
        record: Record,
        unpriced: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.running = False
        self._exact, self._record, self._unpriced = exact, record, unpriced
        self.names = Names(model, paths)
        self.start()

    def start(self) -> None:
        """Forget what belongs to the batch that ran before."""
        self.inside = self.in_neuron = 0
        # Storages of sums of products; the reference keeps the address of a freed one from being used for another.
        self.names.start()
        self._summed: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.running or self.inside:
            return output
        kind = role(func)
        if kind == "product":
            self._product(func, args, output if isinstance(output, Tensor) else output[0])
        elif kind == "unknown" and not self.in_neuron:
            self._unpriced(f"{in_words(func)} in {self.names.place()[0]}")
        elif func.overloadpacket is torch.ops.aten._to_copy and self.names.of_weight(args[0]):
            self.names.note_copy(args[0], output)
        elif func.overloadpacket is torch.ops.aten.mul and _makes_outer_product(args, output):
            self._unpriced(f"mul of all values with all others in {self.names.place()[0]}")
        return output

    def _product(self, func: Any, args: Any, output: Tensor) -> None:
        name = func.overloadpacket.__name__
        if name == "convolution":
            x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
            moves = tuple(stride), tuple(padding), tuple(dilation)
            geometry = Geometry(tuple(weight.shape[2:]), *moves, groups, "zeros", transposed, tuple(output_padding))
            call = count_conv(x.detach(), weight, output, geometry, self._exact)
            self._add(func, self.names.of_weight(weight), call, weight.numel())
        elif name in RECURRENT:
            inputs, weights = steps_of_recurrence(args)
            self._add(func, self.names.place()[0], count_dense(args[0], output, inputs * weights), weights)
        elif name.startswith(ATTENTION):
            q, k, v = (one.detach().flatten(0, -3) for one in args[:3])
            k, v = (one.expand(len(q), -1, -1) for one in (k, v))
            self._matrices(func, q, k.transpose(1, 2), " Q K")
            self._unpriced(f"softmax in {self.names.place()[0]}")
            # What it gives are real values, whatever they are.
            real = torch.linspace(0.25, 0.75, k.shape[1], dtype=q.dtype, device=q.device)
            self._matrices(func, real.expand(len(q), q.shape[1], -1), v, " V")
        else:
            first, second = (args[place].detach() for place in MATRIX_PRODUCTS[name])
            if first.dim() < 2:
                first = first.unsqueeze(0)
            if second.dim() < 2:
                second = second.unsqueeze(1)
            first, second = (one if one.dim() == 3 else one.unsqueeze(0) for one in (first, second))
            self._matrices(func, first, second, output=output)

    def _matrices(self, func: Any, first: Tensor, second: Tensor, part: str = "", output: Tensor | None = None) -> None:
        """Count `first` `[b, M, K]` times `second` `[b, K, N]`."""
        weights = [self.names.of_weight(one) for one in (first, second)]
        outputs = first.shape[0] * first.shape[1] * second.shape[2]
        if any(weights):
            if not weights[1]:  # the weights stand on the left
                first, second = second.transpose(1, 2), first.transpose(1, 2)
            call = count_rows(
                first.flatten(0, 1), (len(first) * first.shape[1],), second.shape[2], outputs, self._exact
            )
            self._add(func, weights[1] or weights[0], call, second.numel())
            return
        sums = first.untyped_storage()._cdata in self._summed, second.untyped_storage()._cdata in self._summed
        self._add(func, "", count_selected(first, second, self._exact, sums), 0, part)
        if output is not None:
            storage = output.untyped_storage()
            self._summed[storage._cdata] = StorageWeakRef(storage)

    def _add(self, func: Any, name: str, call: Call, weights: int, part: str = "") -> None:
        place, site = self.names.place()
        if isinstance(self.names.modules.get(place), _SEQUENCE_FIRST):
            call = replace(call, in_order=False)
        self._record(name or self.names.of_product(in_words(func) + part, place, site), in_words(func), call, weights)


def _makes_outer_product(args: Any, output: Tensor) -> bool:
    """Whether a `mul` multiplies values with several others each, and not only with ones and zeros."""
    first, second = args[:2]
    if not isinstance(second, Tensor) or output.numel() <= max(first.numel(), second.numel()):
        return False
    return not any(bool(((one == 0) | (one == 1)).all()) for one in (first, second))
