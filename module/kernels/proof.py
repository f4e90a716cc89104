"""The proof that a substitute computes what the plain part computes, on the device at hand.

A copy of the part gets new weights, and is run on a small map three times: plain in float64 (the reference), plain in
the run's dtype (where that can decide), and with its substitute. The substitute's error against the reference may be
twice the plain one's, plus a few roundings.

A spike is a comparison, which rounding can turn round, and one spike changes all that follows. So weights are drawn
with which every neuron fires, at 5 to 95%, and each channel is shifted to where no membrane potential is close to the
threshold: then equal arithmetic gives equal spikes. Fresh weights would prove nothing: with them neurons are silent.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from module.kernels.parts import INPUT, FusedPart
from module.kernels.substitute import Context, Substitute, plain_class
from module.layers import over_time
from module.neuron import LIF, ParametricLIF
from module.sps import MS_SPS
from module.v2.attention import Attention
from module.v2.conv import DownSampling

# Beside twice the plain error: so many roundings of the run's dtype, for where the plain result is exact by chance.
_ROUNDINGS = 8
_SIDE = 2  # of the feature map behind all pools
_SUM = 150  # tokens times channels of a head
_DRAWS = 3
_SHIFTS = 33  # tried for each channel


def detached(module: nn.Module) -> nn.Module:
    """A deep copy without substitutes and hooks."""
    clone = copy.deepcopy(module)
    for part in clone.modules():
        part.__class__ = plain_class(part)
    unwatch(clone)
    return clone


def unwatch(module: nn.Module) -> None:
    """Take off every hook."""
    for part in module.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, hooks).clear()


def difference(fast: nn.Module, contexts: Iterable[Context], steps: int) -> str | None:
    """None, or what the substitutes in `fast` compute otherwise than the plain part does.

    Args:
        fast: a copy of a part, with substitutes; its weights and its mode change.
        contexts: where the two are compared.
        steps: T.
    """
    reference = detached(fast).double().cpu()
    reason: str | None = None
    for context in contexts:
        for static in (False, True) if isinstance(fast, FusedPart) and fast.may_be_static() else (False,):
            for draw in range(_DRAWS):
                reason = _difference(reference, fast, context, steps, static, draw)
                # Neurons other than LIF cannot be kept away from their threshold: another draw then decides.
                if reason is None:
                    break
            else:
                return reason
    return reason


def _difference(
    reference: nn.Module, fast: nn.Module, context: Context, steps: int, static: bool, draw: int
) -> str | None:
    device, dtype, autocast, training = context
    generator = torch.Generator().manual_seed(draw)
    reference.train(training)
    fast.train(training)
    x = _input(reference, steps, generator)
    if static:
        x = x[:1].expand(x.shape)
    x = _shown_once(_redraw(reference, fast, x, generator)).to(device, dtype).expand(x.shape)
    # Nobody asks for the gradient of an image; where one is asked for, it is computed as for other inputs.
    wanted = training and not (static and _takes_images(reference))

    def ran(module: nn.Module) -> dict[str, Tensor]:
        module.load_state_dict(state)
        return _run(module, x, autocast, draw, wanted)

    state = {name: value.clone() for name, value in reference.state_dict().items()}
    exact = _run(reference, _shown_once(x).cpu().double().expand(x.shape), None, draw, wanted)
    usual = functools.cache(lambda: ran(detached(fast)))
    return _compared(exact, usual, ran(fast), fast, dtype if autocast is None else autocast)


def _takes_images(part: nn.Module) -> bool:
    return isinstance(part, MS_SPS) or (isinstance(part, DownSampling) and part.first)


def _shown_once(x: Tensor) -> Tensor:
    """One step of a static image, all of another input."""
    return x[:1] if x.stride(0) == 0 else x


def _input(part: nn.Module, steps: int, generator: torch.Generator) -> Tensor:
    """Values that 16 bits hold exactly, `[T, B, C, H, W]`, float64."""
    convs = [layer for layer in part.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d)]
    channels = convs[0].in_channels if convs else 8
    # Larger where a map is made smaller, and for wide kernels, of which it must see all taps; then not a square.
    halved = part.pooling_stat.count("1") if isinstance(part, MS_SPS) else 0
    height = max([_SIDE * 2**halved, *((layer.kernel_size[0] // 2 + 1) * layer.stride[0] for layer in convs)])
    # So many tokens that V2's sums over tokens and channels lie about its threshold.
    per_head = [layer.dim / layer.num_heads for layer in part.modules() if isinstance(layer, Attention)]
    height = max([height, *(round((_SUM / size) ** 0.5) for size in per_head)])
    width = max(height // 2, 1) if halved else height
    # Two samples, so that time and batch cannot be mistaken for each other; in training, where a long sequence alone
    # has enough values for statistics, one is enough.
    batch = 1 if part.training and steps >= 4 and not isinstance(part, nn.Conv1d | nn.Conv2d) else 2
    x = 2 * torch.randn(steps, batch, channels, height, width, generator=generator)
    if isinstance(part, nn.Conv1d | nn.Conv2d):  # of spikes
        return (x > 1).double()
    return x.bfloat16().double()


@torch.no_grad()
def _redraw(part: nn.Module, fast: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """New weights for `part` (float64), in values that 16 bits hold exactly; returns `x`, shifted where needed."""

    def draw(value: Tensor, low: float, high: float) -> None:
        value.copy_((low + (high - low) * torch.rand(value.shape, generator=generator)).bfloat16())

    for layer in part.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            scale = 2 / layer.weight[0].numel() ** 0.5
            draw(layer.weight, -scale, scale)
            if layer.bias is not None:
                draw(layer.bias, -0.1, 0.1)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            for value, low, high in (
                (layer.weight, 0.8, 1.6),
                (layer.bias, 0.0, 0.8),
                (layer.running_mean, -0.1, 0.1),
                (layer.running_var, 0.5, 1.5),
            ):
                draw(value, low, high)
        elif isinstance(layer, ParametricLIF):
            # Not 1/tau = 1/2: with it the attention's sum of one spike would meet the threshold exactly.
            draw(layer.w.data, 0.3, 1.0)  # type: ignore[arg-type]
    if type(part) in (LIF, ParametricLIF):
        return x + _shift(part, x)[:, None, None]
    if not isinstance(fast, FusedPart):
        return x
    state = {name: buffer.clone() for name, buffer in part.named_buffers()}
    layers, static = dict(part.named_modules()), x.stride(0) == 0
    handles = []
    reached: list[nn.Module] = []
    for name, shifted in fast.neurons.items():
        neuron = layers.get(name)
        if shifted is None or type(neuron) not in (LIF, ParametricLIF):
            continue
        assert neuron is not None
        if shifted == INPUT:
            x = (x + _shift(neuron, x)[:, None, None]).bfloat16().double()
            x = x[:1].expand(x.shape) if static else x
            continue
        # A BatchNorm may have been folded into the convolution before it.
        biases = (getattr(layers.get(path), "bias", None) for path in shifted)
        bias = next(bias for bias in biases if isinstance(bias, Tensor))
        bias.zero_()
        handles.append(neuron.register_forward_pre_hook(functools.partial(_set_bias, bias, reached)))
    if handles:
        part(x)
    for handle in handles:
        handle.remove()
    if len(reached) < len(handles):
        raise RuntimeError("a neuron is no part of the computation")
    for name, buffer in part.named_buffers():
        buffer.copy_(state[name])
    return x


def _set_bias(bias: Tensor, reached: list[nn.Module], neuron: nn.Module, currents: tuple[Tensor]) -> Tensor:
    """Before `neuron` gets its current: shift that, and likewise `bias`, which was 0 so far."""
    (current,) = currents
    reached.append(neuron)
    bias.copy_(_shift(neuron, current))
    return current + bias.view(-1, *[1] * (current.dim() - 3))


def _shift(neuron: nn.Module, current: Tensor) -> Tensor:
    """Per channel, `[C]`: what to add to the current `[T, B, C, *]` so that the neuron fires at 5 to 95% and no
    potential is close to the threshold."""
    node: Any = neuron
    current = current.transpose(1, 2).flatten(2)  # [T, C, B * H * W]
    decay = float(node.w.sigmoid()) if isinstance(neuron, ParametricLIF) else 1 / node.tau
    threshold = float(node.v_threshold)
    middle = 1.5 * threshold - current.mean(dim=(0, 2))  # [C]
    shifts = torch.linspace(-0.5, 0.5, _SHIFTS, dtype=torch.float64)[:, None] + middle  # [shifts, C]
    shifts = shifts.bfloat16().double()
    # In float32: a margin is much larger than its rounding.
    moved = shifts.float()[:, :, None]
    v = torch.zeros(_SHIFTS, *current.shape[1:])
    margin, fired = torch.full(shifts.shape, torch.inf), torch.zeros(shifts.shape)
    for step in current.float():
        h = v.lerp_(step + moved, decay)
        margin = torch.minimum(margin, (h - threshold).abs_().amin(dim=2))
        spikes = h >= threshold
        fired += spikes.float().mean(dim=2) / len(current)
        v = h.masked_fill_(spikes, 0.0)
    useful = (fired > 0.05) & (fired < 0.95)
    best = torch.where(useful, margin, margin - 1e6).argmax(dim=0)
    return shifts.gather(0, best[None])[0]


def _run(part: nn.Module, x: Tensor, autocast: torch.dtype | None, draw: int, wanted: bool) -> dict[str, Tensor]:
    """Output, gradients (that of the input if `wanted`) and buffers by name, in float64 on the CPU."""
    training = part.training
    leaf = _shown_once(x).detach().clone().requires_grad_(wanted)
    seen = leaf.expand(x.shape)
    part.zero_grad()
    with torch.set_grad_enabled(training), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        if isinstance(part, nn.Conv1d):
            seen = seen.flatten(3)
        y = over_time(seen, part) if isinstance(part, nn.Conv1d | nn.Conv2d) else part(seen)
        if training:
            gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(draw)).bfloat16()
            y.backward(gradient.to(y.device, y.dtype))
    found = {"output": y.detach()} | ({"gradient of the input": leaf.grad} if leaf.grad is not None else {})
    if training:
        found |= {f"gradient of {name}": p.grad for name, p in part.named_parameters() if p.grad is not None}
        found |= {name: buffer for name, buffer in part.named_buffers() if buffer.is_floating_point()}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _compared(
    exact: dict[str, Tensor],
    usual: Callable[[], dict[str, Tensor]],
    actual: dict[str, Tensor],
    fast: nn.Module,
    dtype: torch.dtype,
) -> str | None:
    """`usual` computes the plain results; it is only called where `actual` has more than a few roundings."""
    if exact.keys() != actual.keys():
        return f"{', '.join(sorted(exact.keys() ^ actual.keys()))} missing or new"
    # In float64 the plain result is the reference itself, so its error is 0: only the order of sums may differ.
    rounding = 1e-12 if dtype == torch.float64 else _ROUNDINGS * torch.finfo(dtype).eps
    tolerance = max((s.gradient_tolerance for s in fast.modules() if isinstance(s, Substitute)), default=0.0)
    for gradients, floor in ((False, 0.0), (True, tolerance)):
        names = [name for name in exact if name.startswith("gradient of ") == gradients]
        sizes = _sizes({name: exact[name] for name in names})
        errors = {name: _error(actual[name], exact[name]) / sizes[name] for name in names}
        if all(error <= rounding + floor for error in errors.values()):
            continue
        # Gradients are judged together: one of them may be exact by chance in the plain run.
        own = {name: _error(usual()[name], exact[name]) / sizes[name] for name in names}
        for name in names:
            allowed = 2 * (max(own.values()) if gradients else own[name]) + rounding + floor
            if not errors[name] <= allowed:
                return f"{name} differs by {errors[name]:.1e} of its size from float64, where {allowed:.1e} is allowed"
    return None


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max())


def _sizes(values: dict[str, Tensor]) -> dict[str, float]:
    """The largest value of each; the largest of all for one that is nearly 0 everywhere, or a single number."""
    sizes = {name: float(value.abs().max()) for name, value in values.items()}
    largest = max(sizes.values(), default=1.0) or 1.0
    # A bias that BatchNorm takes away again has a gradient of 0, which rounding fills with noise; that of a time
    # constant is a sum over all elements, whose terms cancel.
    return {n: size if size > 1e-3 * largest and values[n].numel() > 1 else largest for n, size in sizes.items()}
