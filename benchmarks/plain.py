"""The baseline, **plain**: this model with SpikingJelly's neurons, as the published implementation computes it.

Same parameters and results; every convolution, BatchNorm and neuron runs by itself in the input's layout, a static
image is convolved at each of the T steps, attention splits heads. The neurons are SpikingJelly's own, with its scripted
functions in evaluation. Kept apart from the model, its neurons and its acceleration, so that speeding those up can
never speed the baseline up.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, h heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model import SpikeDrivenTransformer, sdt_arguments
from module import MS_SPS, MS_MLP_Conv, MS_SSA_Conv
from module.kernels.backends import why_cupy_cannot_be_used
from module.neuron import SURROGATES, sj_neuron


class _FreshState(nn.Module):
    """Resets a SpikingJelly node around each forward pass, and keeps its state in float32 for 16-bit inputs."""

    neuron_dtype: str = "float32"

    def forward(self, x: Tensor) -> Tensor:
        node: Any = self
        node.reset()
        raised = self.neuron_dtype == "float32" and x.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(x.device.type, enabled=False):
            spikes = super().forward(x.float() if raised else x)
        node.reset()  # holds no graph
        return spikes.to(x.dtype)


class PlainLIF(_FreshState, sj_neuron.LIFNode):
    """SpikingJelly's LIF neuron."""


class PlainParametricLIF(_FreshState, sj_neuron.ParametricLIFNode):
    """SpikingJelly's parametric LIF neuron."""


def neuron(
    spike_mode: str = "lif",
    *,
    v_threshold: float = 1.0,
    surrogate: str = "sigmoid",
    surrogate_alpha: float = 4.0,
    neuron_dtype: str = "float32",
    neuron_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """As `module.neuron.make_neuron`, for the two published neurons. Raises ValueError for another one."""
    kinds = {"lif": PlainLIF, "plif": PlainParametricLIF}
    if spike_mode not in kinds:
        raise ValueError(f"spike_mode={spike_mode!r}: the baseline has {' and '.join(kinds)} only")
    published = dict(
        v_threshold=v_threshold,
        v_reset=0.0,
        detach_reset=True,
        surrogate_function=SURROGATES[surrogate](alpha=surrogate_alpha),
        step_mode="m",
    )
    node = kinds[spike_mode](**(published | dict(neuron_args or {})))
    node.neuron_dtype = neuron_dtype
    return node


def choose_backend(model: nn.Module) -> None:
    """SpikingJelly's CuPy kernels for the neurons of a model on CUDA where those work, else its torch code."""
    on_cuda = next(model.parameters()).is_cuda
    nodes: list[Any] = [node for node in model.modules() if isinstance(node, _FreshState)]
    for node in nodes:
        node.backend = "cupy" if on_cuda and why_cupy_cannot_be_used() is None else "torch"


class PlainSDT(SpikeDrivenTransformer):
    """`SpikeDrivenTransformer` with the forward pass of the published implementation; takes the arguments of
    `model.sdt`.

    Attributes:
        arguments: those given, to build the same network as `model.sdt`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**sdt_arguments(**({"neuron": neuron} | arguments)))
        self.arguments = arguments

    def to(self, *args: Any, **kwargs: Any) -> PlainSDT:
        moved = super().to(*args, **kwargs)
        choose_backend(moved)
        return moved

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._to_time_first(x).contiguous()
        x = _patch_splitting(self.patch_embed, x)  # type: ignore[arg-type]
        for block in self.block:
            x = _attention(block.attn, x)  # type: ignore[arg-type]
            x = _mlp(block.mlp, x)  # type: ignore[arg-type]
        return x.mean(dim=(3, 4))


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer` on `[T, B, *]`, time and batch as one dimension."""
    y: Tensor = layer(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def _patch_splitting(m: MS_SPS, x: Tensor) -> Tensor:
    x = over_time(m.maxpool, m.proj_lif(over_time(m.proj_bn, over_time(m.proj_conv, x))))
    x = over_time(m.maxpool1, m.proj_lif1(over_time(m.proj_bn1, over_time(m.proj_conv1, x))))
    x = over_time(m.maxpool2, m.proj_lif2(over_time(m.proj_bn2, over_time(m.proj_conv2, x))))
    x = over_time(m.maxpool3, over_time(m.proj_bn3, over_time(m.proj_conv3, x)))
    return over_time(m.rpe_bn, over_time(m.rpe_conv, m.proj_lif3(x))) + x


def _attention(m: MS_SSA_Conv, x: Tensor) -> Tensor:
    T, B, D, H, W = x.shape
    s = m.shortcut_lif(x)

    def heads(t: Tensor) -> Tensor:
        return t.flatten(3).transpose(2, 3).reshape(T, B, H * W, m.num_heads, -1).transpose(2, 3)  # [T, B, h, N, D/h]

    q = heads(m.q_lif(over_time(m.q_bn, over_time(m.q_conv, s))).contiguous())
    k = heads(m.k_pool(m.k_lif(over_time(m.k_bn, over_time(m.k_conv, s)))).contiguous())
    v = heads(m.v_pool(m.v_lif(over_time(m.v_bn, over_time(m.v_conv, s)))).contiguous())
    kv = m.kv_pool(k * v).sum(dim=3, keepdim=True)
    y = m.x_pool(q * m.talking_heads_lif(kv))
    y = y.transpose(3, 4).reshape(T, B, D, H, W).contiguous()
    return over_time(m.proj_bn, over_time(m.proj_conv, y)) + x


def _mlp(m: MS_MLP_Conv, x: Tensor) -> Tensor:
    a = over_time(m.fc1_bn, over_time(m.fc1_conv, m.fc1_lif(x)))
    if m.shortcut_after_fc1:
        x = a = a + x
    return over_time(m.fc2_bn, over_time(m.fc2_conv, m.fc2_lif(a))) + x
