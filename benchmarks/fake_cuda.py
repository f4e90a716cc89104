"""What a training step moves on a CUDA device, counted without one: a bound, not a measurement.

The model runs on fake CUDA tensors, which have shapes, dtypes and layouts but no values; torch's backward engine would
need a device, so the graph is walked here. Every operator counts the bytes of its inputs and outputs (an expanded
dimension once), and further passes where the real kernels make them. The bound is the time at an H100's full bandwidth
and arithmetic. Fake convolutions of bfloat16 report another layout than the real ones; float16 is right.

    python -m benchmarks.fake_cuda --depth 8 --dim 512 --batch 64 [--show 100]

Legend: T time steps, B batch, C channels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import MetaSpikeFormer, SpikeDrivenTransformer
from module.accelerate import accelerate
from module.neuron import make_neuron

_V2 = {"15m": (64, 128, 256, 360), "55m": (128, 256, 512, 640)}
BANDWIDTH, FLOPS = 3.35e12, 800e12  # H100: bytes/s, dense 16-bit FLOP/s
_VIEWS = re.compile(
    "view|_unsafe_view|expand|transpose|permute|unsqueeze|squeeze|select|slice|detach|alias|t|unbind|split|as_strided|"
    "unflatten|_reshape_alias|lift_fresh|is_pinned|split_with_sizes|chunk|narrow|prim::.*|.*empty.*"
)

# Operators of this project that read an input in more than one pass: how often each input is read again. Statistics are
# a pass over the input, and so are the sums of a backward pass. `attend` reads what it keeps once more.
FURTHER_PASSES: dict[str, dict[int, int]] = {
    "sdt::bn_lif": {0: 1},
    "sdt::bn_add": {0: 1},
    "sdt::bn_bn_lif": {0: 1},
    "sdt::bn_bn_add": {0: 1},
    "sdt::bn_lif_pool": {0: 1},
    "sdt::bn_lif_backward": {0: 1, 1: 1},
    "sdt::bn_lif_pool_backward": {0: 1, 1: 1, 2: 1},
    "sdt::bn_add_backward": {0: 1, 1: 1},
    "sdt::attend_backward": {0: 1, 1: 1},
}
_READ_AGAIN = {"sdt::attend": {2: 1}}  # outputs


class Operand(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    bytes: int


class Row(NamedTuple):
    """One operator of the step."""

    phase: str  # "forward" or "backward"
    name: str
    inputs: list[Operand]
    outputs: list[Operand]

    @property
    def cost(self) -> tuple[int, int]:
        """Bytes, and floating-point operations of products."""
        name, ins, outs = self.name, self.inputs, self.outputs
        moved = sum(operand.bytes for operand in (*ins, *outs))
        moved += sum(ins[i].bytes * times for i, times in FURTHER_PASSES.get(name, {}).items())
        moved += sum(outs[i].bytes * times for i, times in _READ_AGAIN.get(name, {}).items())
        if name.endswith("_batch_norm"):
            moved += ins[0].bytes
        elif name.endswith("batch_norm_backward"):
            moved += ins[0].bytes + ins[1].bytes
        elif name.endswith("max_pool2d_with_indices_backward"):
            moved -= ins[1].bytes
        elif name.endswith("::convolution"):
            return moved, 2 * math.prod(outs[0].shape) * math.prod(ins[1].shape[1:])
        elif name.endswith("convolution_backward"):
            g, x, weight = ins[:3]
            products = 2 if any(out.shape == x.shape for out in outs) else 1
            return moved + g.bytes, 2 * math.prod(g.shape) * math.prod(weight.shape[1:]) * products
        elif name.endswith(("::mm", "::addmm", "::bmm")):
            return moved, 2 * math.prod(outs[0].shape) * ins[-2].shape[-1]
        return moved, 0


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not _VIEWS.fullmatch(name.removeprefix("aten::")):
            self.rows.append(Row(self.phase, name, _operands((args, kwargs)), _operands(out)))
        return out


def _operands(values: Any) -> list[Operand]:
    return [
        Operand(tuple(t.shape), t.dtype, tuple(t.stride()), _bytes(t))
        for t in tree_leaves(values)
        if isinstance(t, Tensor)
    ]


def _bytes(t: Tensor) -> int:
    return t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


def _walk_backward(loss: Tensor) -> None:
    """What `loss.backward()` calls, in an order that the graph allows."""
    root: Any = loss.grad_fn
    waiting: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    gradients: dict[Any, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    ready = [root]
    while ready:
        node = ready.pop()
        mine = gradients.pop(node)
        if "AccumulateGrad" in node.name():
            continue
        mine += [None] * (len(node._input_metadata) - len(mine))
        outs = node(*mine) if callable(node) else node.apply(*mine)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        for (following, index), gradient in zip(node.next_functions, outs, strict=False):
            if following is None:
                continue
            slots = gradients.setdefault(following, [])
            slots += [None] * (index + 1 - len(slots))
            if gradient is not None:
                slots[index] = gradient if slots[index] is None else slots[index] + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


@contextlib.contextmanager
def without_random_numbers() -> Iterator[None]:
    """Fake tensors hold none, and drawing them takes its time."""
    truncated = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda t, **_: t
    try:
        yield
    finally:
        nn.init.trunc_normal_ = truncated


class Step(NamedTuple):
    """A step's operators, and how many bytes it keeps for the backward pass beside the parameters."""

    rows: list[Row]
    kept: int

    def totals(self) -> tuple[int, int, float]:
        """Bytes, floating-point operations, and seconds if nothing but them took time."""
        costs = [row.cost for row in self.rows]
        seconds = sum(max(moved / BANDWIDTH, flops / FLOPS) for moved, flops in costs)
        return sum(moved for moved, _ in costs), sum(flops for _, flops in costs), seconds


def step(
    build: Callable[[], nn.Module],
    batch: int,
    dtype: torch.dtype | None = torch.float16,
    *,
    side: int = 224,
    channels: int = 3,
    training: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> Step:
    """One training step, or one evaluation, of the model that `build` makes; weights and images in `layout`, autocast
    to `dtype`."""
    storages: dict[int, int] = {}
    with without_random_numbers(), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = build().train(training)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=layout))
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        x = torch.empty(batch, channels, side, side, device="cuda").contiguous(memory_format=layout)
        targets = torch.zeros(batch, dtype=torch.long, device="cuda")

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # so that no later storage gets its address
            return tensor

        alive: list[Tensor] = []
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with _Recorder() as recorder, torch.set_grad_enabled(training):
            torch.set_autocast_enabled("cuda", dtype is not None)
            torch.set_autocast_dtype("cuda", dtype or torch.float16)
            try:
                with saving:
                    logits = model(x)[0]
                    loss = F.cross_entropy(logits.float(), targets)
            finally:
                torch.set_autocast_enabled("cuda", False)
                torch.clear_autocast_cache()
            if training:
                recorder.phase = "backward"
                _walk_backward(loss)
    return Step(recorder.rows, sum(storages.values()))


def accelerated(
    kernels: str = "auto", network: Callable[..., nn.Module] = SpikeDrivenTransformer, **sizes: Any
) -> nn.Module:
    """The model as it runs on CUDA, with the substitutes attached without their proof."""
    return accelerate(network(**sizes), kernels=kernels, prove=False, neuron_backend="triton")


def in_words(row: Row) -> str:
    def operand(o: Operand) -> str:
        order = "" if len(o.shape) < 4 else " last" if o.strides[-3] == 1 and o.shape[-3] > 1 else " first"
        return f"{'x'.join(map(str, o.shape))} {str(o.dtype).removeprefix('torch.')}{order}"

    sides = (", ".join(map(operand, operands)) for operands in (row.inputs, row.outputs))
    return f"{row.phase:8} {row.name:36} {row.cost[0] / 2**20:9.1f} MiB  {' -> '.join(sides)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("depth", 8), ("dim", 512), ("batch", 64), ("side", 224), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--evaluate", action="store_true", help="an evaluation instead of a training step")
    parser.add_argument("--kernels", default="auto", choices=("auto", "plain"), help="plain: kernels for neurons alone")
    parser.add_argument("--layout", default="last", choices=("last", "first"), help="where channels are in memory")
    parser.add_argument("--neuron", default="lif", choices=("lif", "plif"))
    parser.add_argument("--v2", choices=tuple(_V2), help="a model of V2 of that size, instead of --depth and --dim")
    parser.add_argument("--events", action="store_true", help="event frames: two channels, pools in the attention")
    parser.add_argument("--show", type=float, metavar="MIB", help="list the operators that move so much")
    given = parser.parse_args()
    sizes: dict[str, Any] = dict(embed_dims=given.dim, depths=given.depth, img_size=given.side, T=given.steps)
    dtype = None if given.dtype == "float32" else getattr(torch, given.dtype)
    sizes |= dict(neuron=functools.partial(make_neuron, given.neuron))
    channels = 2 if given.events else 3
    if given.events:
        sizes |= dict(in_channels=channels, dvs_mode=True)
    if given.v2:
        sizes |= dict(network=MetaSpikeFormer, embed_dims=_V2[given.v2], depths=(6, 2))
    build = functools.partial(accelerated, given.kernels, **sizes)
    layout = torch.channels_last if given.layout == "last" else torch.contiguous_format
    options: dict[str, Any] = dict(side=given.side, channels=channels, training=not given.evaluate, layout=layout)
    done = step(build, given.batch, dtype, **options)
    for row in done.rows if given.show is not None else ():
        if row.cost[0] >= given.show * 2**20:
            print(in_words(row))
    moved, flops, seconds = done.totals()
    print(
        f"{len(done.rows)} operators, {moved / 1e9:.1f} GB, {flops / 1e12:.2f} TFLOP, {done.kept / 1e9:.1f} GB kept "
        f"for the backward pass; bound on an H100: {seconds * 1e3:.1f} ms, {given.batch / seconds:.0f} images/s"
    )


if __name__ == "__main__":
    main()
