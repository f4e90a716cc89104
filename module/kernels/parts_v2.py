"""Substitutes of the parts of V2 (module/v2): the same layers, computed together where possible.

A part of which somebody watches a layer runs as it is written.

Legend: T time steps, B batch, C channels, H x W feature map, N = H*W tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.kernels import cpu, depthwise, triton_device
from module.kernels.batchnorm_twice import norms_norms_add, norms_norms_neurons
from module.kernels.fusion import (
    can_fuse_neurons,
    can_fuse_norms,
    channels_innermost,
    convolved,
    joined_affine,
    norm_add,
    norm_neuron,
    running_affine,
    update_running,
)
from module.kernels.head_products import head_products
from module.kernels.lif import once
from module.kernels.neurons import KernelNeuron
from module.kernels.parts import INPUT, FusedPart
from module.kernels.spike_conv import fits, spike_conv2d
from module.kernels.substitute import autocast_dtype, plain_class, watched
from module.layers import over_time
from module.v2.attention import SCALE, Attention
from module.v2.block import TransformerBlock
from module.v2.conv import ConvBlock, DownSampling, SeparableConv
from module.v2.mlp import MLP
from module.v2.repconv import BorderedBatchNorm, RepConv

_OVER_TIME = {"module.layers:over_time": "784d7585bdd8ffa2"}
# Winograd's algorithm, as in `module.kernels.parts.FusedSPS`.
_WINOGRAD = 1e-5


def on_cpu(x: Tensor) -> bool:
    """Whether the operators of convolutions, which exist for CPUs alone, can compute `x`."""
    return not triton_device.runs(x) and cpu.usable(x) and autocast_dtype("cpu") in (None, *cpu.DTYPES)


def of_spikes(conv: nn.Module, neuron: nn.Module, s: Tensor) -> Tensor:
    """`over_time(s, conv)` for the spikes `s` `[T, B, C, H, W]` of `neuron`."""
    if type(conv) is nn.Conv2d and fits(conv) and isinstance(neuron, KernelNeuron) and on_cpu(s):
        y = spike_conv2d(s.flatten(0, 1), conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))
        return y.unflatten(0, s.shape[:2])
    return convolved(conv, s)


class FusedV2(FusedPart):
    """A part of V2; a layer inside that somebody watches makes it plain."""

    def may_run(self, x: Tensor) -> bool:
        return super().may_run(x) and not watched(*list(self.modules())[1:])

    def added(self, x: Tensor) -> Tensor:
        """`x` plus what this part makes of it."""
        return self.fast_forward(x) + x


def added(part: nn.Module, x: Tensor) -> Tensor:
    """`x + part(x)`."""
    if isinstance(part, FusedV2) and part.may_run(x) and not watched(part):
        return part.added(x)
    y: Tensor = x + part(x)
    return y


class FusedDownSampling(FusedV2, DownSampling):
    plain_class: ClassVar[type[nn.Module]] = DownSampling
    stands_for: ClassVar[dict[str, str]] = {"module.v2.conv:DownSampling.forward": "fa4c5855429ad28b", **_OVER_TIME}
    gradient_tolerance = _WINOGRAD
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {"encode_lif": INPUT}

    def may_be_static(self) -> bool:
        return self.first

    def fast_forward(self, x: Tensor) -> Tensor:
        steps = len(x)
        x = channels_innermost(x)
        if not self.first:
            y = of_spikes(self.encode_conv, self.encode_lif, self.encode_lif(x))
        else:
            # Batch statistics over T equal copies of an image are those over one.
            y = over_time(once(x), self.encode_conv)
        return norm_add(self.encode_bn, channels_innermost(y), steps=steps)


class FusedSeparableConv(FusedV2, SeparableConv):
    plain_class: ClassVar[type[nn.Module]] = SeparableConv
    stands_for: ClassVar[dict[str, str]] = {"module.v2.conv:SeparableConv.forward": "7054ae12278d413b", **_OVER_TIME}
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {"lif1": INPUT, "lif2": ("bn1", "pwconv1")}

    def fast_forward(self, x: Tensor) -> Tensor:
        return norm_add(self.bn2, self._before_norm(x))

    def added(self, x: Tensor) -> Tensor:
        return norm_add(self.bn2, self._before_norm(x), x)

    def _before_norm(self, x: Tensor) -> Tensor:
        a = of_spikes(self.pwconv1, self.lif1, self.lif1(channels_innermost(x)))
        s = norm_neuron(self.bn1, self.lif2, a)  # [T, B, 2 C, H, W]
        if isinstance(self.lif2, KernelNeuron) and on_cpu(s) and depthwise.fits(self.dwconv, self.pwconv2):
            y = depthwise.of_spikes(s.flatten(0, 1), self.dwconv.weight, self.pwconv2.weight)
            return y.unflatten(0, s.shape[:2])
        return over_time(s, self.dwconv, self.pwconv2)


class FusedConvBlock(FusedV2, ConvBlock):
    plain_class: ClassVar[type[nn.Module]] = ConvBlock
    stands_for: ClassVar[dict[str, str]] = {
        "module.v2.conv:ConvBlock.forward": "10cab47de2b98efe",
        **_OVER_TIME,
    }
    gradient_tolerance = _WINOGRAD
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {
        "Conv.lif1": INPUT,
        "Conv.lif2": ("Conv.bn1", "Conv.pwconv1"),
        "lif1": ("Conv.bn2", "Conv.dwconv"),
        "lif2": ("bn1", "conv1"),
    }

    def may_be_static(self) -> bool:
        return True  # the first one, behind an image's BatchNorm

    def fast_forward(self, x: Tensor) -> Tensor:
        x = added(self.Conv, channels_innermost(x))
        s = norm_neuron(self.bn1, self.lif2, of_spikes(self.conv1, self.lif1, self.lif1(x)))
        return norm_add(self.bn2, of_spikes(self.conv2, self.lif2, s), x)


class FusedV2Attention(FusedV2, Attention):
    plain_class: ClassVar[type[nn.Module]] = Attention
    stands_for: ClassVar[dict[str, str]] = {
        "module.v2.attention:Attention.forward": "24cb6cbe21fecbbc",
        "module.v2.attention:Attention._attend": "a787b4434da27c56",
        "module.v2.attention:Attention._split_heads": "03e53be1f28baaff",
        "module.v2.repconv:RepConv.forward": "d77f7a91046eac99",
        "module.v2.repconv:BorderedBatchNorm.forward": "1ad42e8d54dba4dd",
        "module.v2.repconv:BorderedBatchNorm.border": "06eb4daf4a4d516b",
        **_OVER_TIME,
    }
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {
        "head_lif": INPUT,
        "q_lif": ("q_conv.1", "q_conv"),
        "k_lif": ("k_conv.1", "k_conv"),
        "v_lif": ("v_conv.1", "v_conv"),
        "attn_lif": None,
    }

    def may_run(self, x: Tensor) -> bool:
        neurons = (self.head_lif, self.q_lif, self.k_lif, self.v_lif, self.attn_lif)
        return super().may_run(x) and can_fuse_neurons(x, *neurons)

    def fast_forward(self, x: Tensor) -> Tensor:
        return rep_conv_added(self.proj_conv, self.attn_lif, self._attended(x), None)

    def added(self, x: Tensor) -> Tensor:
        return rep_conv_added(self.proj_conv, self.attn_lif, self._attended(x), x)

    def _attended(self, x: Tensor) -> Tensor:
        """Spikes of `attn_lif`, `[T, B, C, H, W]`."""
        s = self.head_lif(channels_innermost(x))
        convs: list[Any] = [self.q_conv, self.k_conv, self.v_conv]
        neurons = [n for n in (self.q_lif, self.k_lif, self.v_lif) if isinstance(n, KernelNeuron)]
        if on_cpu(s) and are_rep_convs(s, *convs) and _alike(neurons):
            qkv = norms_norms_neurons(*_last_norms(convs), neurons[0], _rep_convs(convs, s))
            return self.attn_lif(head_products(qkv, self.num_heads, SCALE))
        q, k, v = (
            n(channels_innermost(of_spikes(conv, self.head_lif, s))) for conv, n in zip(convs, neurons, strict=True)
        )
        y: Tensor = self.attn_lif(self._attend(q, k, v))
        return y.unflatten(3, x.shape[3:])


def _alike(neurons: Any) -> bool:
    """Whether one of these neurons stands for all, with a time constant that is not learned."""
    return len({(plain_class(n), n.constants(), getattr(n, "tau", None)) for n in neurons}) == 1 and hasattr(
        neurons[0], "tau"
    )


def are_rep_convs(x: Tensor, *convs: Any) -> bool:
    """Whether the kernels compute these RepConvs with the BatchNorm after each, side by side, for an input like `x`."""
    norms: list[tuple[Any, ...]] = []
    for conv in convs:
        if type(conv) is not nn.Sequential or len(conv) != 2 or type(conv[0]) is not RepConv:
            return False
        body: Any = conv[0].body
        first, bordered, (dw, pw, inner) = body
        if type(bordered) is not BorderedBatchNorm or "border" in vars(bordered):
            return False
        if not fits(first) or not depthwise.fits(dw, pw, padding=0) or first.bias is not None:
            return False
        norms.append((bordered.bn, inner, conv[1]))
    return all(
        can_fuse_norms(x, *group) and len({(n.eps, n.momentum, n.track_running_stats) for n in group}) == 1
        for group in zip(*norms, strict=True)
    )


def _rep_convs(convs: Any, s: Tensor) -> Tensor:
    """What RepConvs make of the spikes `s`, side by side, before their last BatchNorm."""
    bodies = [conv[0].body for conv in convs]
    weight = torch.cat([body[0].weight for body in bodies])
    convolve = getattr(bodies[0][0], "convolve", spike_conv2d)  # a sparse convolution's own way
    a = convolve(s.flatten(0, 1), weight, None)  # [T*B, 3 C, H, W]
    norms = [body[1].bn for body in bodies]
    weights = (torch.cat([body[2][0].weight for body in bodies]), torch.cat([body[2][1].weight for body in bodies]))
    bn = norms[0]
    if bn.training:
        running = torch.cat([n.running_mean for n in norms]), torch.cat([n.running_var for n in norms])
        momentum = bn.momentum if bn.momentum is not None else 1.0 / (float(bn.num_batches_tracked) + 1.0)
        y, mean, var, _ = depthwise.behind_batchnorm(
            a, *joined_affine(norms), *running, *weights, len(convs), momentum, bn.eps
        )
        update_running(norms, mean, var, a.numel() // a.shape[1])
    else:
        scales, shifts = zip(*map(running_affine, norms), strict=True)
        y = depthwise.behind_affine(a, torch.cat(scales), torch.cat(shifts), *weights, len(convs))
    return y.unflatten(0, s.shape[:2])


def _last_norms(convs: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The last BatchNorm in each RepConv, and the one after it."""
    return [conv[0].body[2][2] for conv in convs], [conv[1] for conv in convs]


def rep_conv_added(conv: Any, neuron: nn.Module, s: Tensor, residual: Tensor | None) -> Tensor:
    """`over_time(s, conv)`, plus `residual` if there is one, for a RepConv, merged or not, of spikes of `neuron`."""
    if on_cpu(s) and are_rep_convs(s, conv):
        return norms_norms_add(*_last_norms([conv]), _rep_convs([conv], s), residual)
    y = of_spikes(conv, neuron, s)
    return y if residual is None else y + residual


class FusedV2MLP(FusedV2, MLP):
    plain_class: ClassVar[type[nn.Module]] = MLP
    stands_for: ClassVar[dict[str, str]] = {"module.v2.mlp:MLP.forward": "d4c058194df6c0b7", **_OVER_TIME}
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {"fc1_lif": INPUT, "fc2_lif": ("fc1_bn", "fc1_conv")}

    def may_run(self, x: Tensor) -> bool:
        return super().may_run(x) and can_fuse_neurons(x, self.fc1_lif, self.fc2_lif)

    def fast_forward(self, x: Tensor) -> Tensor:
        return norm_add(self.fc2_bn, self._before_norm(x))

    def added(self, x: Tensor) -> Tensor:
        return norm_add(self.fc2_bn, self._before_norm(x), x)

    def _before_norm(self, x: Tensor) -> Tensor:
        a = _token_conv(self.fc1_conv, self.fc1_lif(channels_innermost(x)))  # [T, B, hidden, H, W]
        return _token_conv(self.fc2_conv, norm_neuron(self.fc1_bn, self.fc2_lif, a))


def _token_conv(conv: Any, s: Tensor) -> Tensor:
    """A Conv1d of one token, of spikes `[T, B, C, H, W]`."""
    weight = conv.weight.unsqueeze(3)
    # A sparse convolution's own way.
    convolve = getattr(conv, "convolve", spike_conv2d if on_cpu(s) else F.conv2d)
    return convolve(s.flatten(0, 1), weight, conv.bias).unflatten(0, s.shape[:2])


class FusedTransformerBlock(FusedV2, TransformerBlock):
    plain_class: ClassVar[type[nn.Module]] = TransformerBlock
    stands_for: ClassVar[dict[str, str]] = {
        "module.v2.block:TransformerBlock.forward": "355a2912ba479633",
    }
    neurons: ClassVar[dict[str, str | tuple[str, ...] | None]] = {
        **{
            f"attn.{name}": norms and tuple(f"attn.{norm}" for norm in norms)
            for name, norms in FusedV2Attention.neurons.items()
        },
        "attn.head_lif": INPUT,
        "mlp.fc1_lif": ("attn.proj_conv.1", "attn.proj_conv"),
        "mlp.fc2_lif": ("mlp.fc1_bn", "mlp.fc1_conv"),
    }

    def fast_forward(self, x: Tensor) -> Tensor:
        return added(self.mlp, added(self.attn, channels_innermost(x)))


# Those that contain others last: they are proved with these.
PARTS_V2: tuple[dict[type[nn.Module], type[FusedPart]], ...] = tuple(
    {part.plain_class: part for part in parts}
    for parts in (
        (FusedDownSampling, FusedSeparableConv, FusedV2Attention, FusedV2MLP),
        (FusedConvBlock, FusedTransformerBlock),
    )
)
