"""The baseline, **plain**: this model with SpikingJelly's neurons, as the published implementation computes it.

Same parameters and results; every convolution, BatchNorm and neuron runs by itself in the input's layout, a static
image is convolved at each of the T steps, attention splits heads. Kept apart from the model, so that speeding the
model up can never speed the baseline up.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, h heads, N tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model import SpikeDrivenTransformer
from module import MS_SPS, MS_MLP_Conv, MS_SSA_Conv
from module.neuron import set_neuron_backend, why_cupy_cannot_be_used


class PlainSDT(SpikeDrivenTransformer):
    """`SpikeDrivenTransformer` with the forward pass of the published implementation.

    The neurons run on SpikingJelly's CuPy kernels on CUDA where those work, else on its torch code.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        set_neuron_backend(self, "torch")

    def to(self, *args: Any, **kwargs: Any) -> PlainSDT:
        moved = super().to(*args, **kwargs)
        on_cuda = next(moved.parameters()).is_cuda
        # `auto` on CUDA would be the same but for the fallback; said outright, a baseline that fell back is seen.
        set_neuron_backend(moved, "cupy" if on_cuda and why_cupy_cannot_be_used() is None else "torch")
        return moved

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._to_time_first(x).contiguous()
        x = _patch_splitting(self.patch_embed, x)
        for block in self.block:
            x = _attention(block.attn, x)  # type: ignore[arg-type]
            x = _mlp(block.mlp, x)  # type: ignore[arg-type]
        return x.mean(dim=(3, 4))


def _over_time(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def _patch_splitting(m: MS_SPS, x: Tensor) -> Tensor:
    x = _over_time(m.maxpool, m.proj_lif(_over_time(m.proj_bn, _over_time(m.proj_conv, x))))
    x = _over_time(m.maxpool1, m.proj_lif1(_over_time(m.proj_bn1, _over_time(m.proj_conv1, x))))
    x = _over_time(m.maxpool2, m.proj_lif2(_over_time(m.proj_bn2, _over_time(m.proj_conv2, x))))
    x = _over_time(m.maxpool3, _over_time(m.proj_bn3, _over_time(m.proj_conv3, x)))
    return _over_time(m.rpe_bn, _over_time(m.rpe_conv, m.proj_lif3(x))) + x


def _attention(m: MS_SSA_Conv, x: Tensor) -> Tensor:
    T, B, D, H, W = x.shape
    s = m.shortcut_lif(x)

    def heads(t: Tensor) -> Tensor:
        return t.flatten(3).transpose(2, 3).reshape(T, B, H * W, m.num_heads, -1).transpose(2, 3)  # [T, B, h, N, D/h]

    q = heads(m.q_lif(_over_time(m.q_bn, _over_time(m.q_conv, s))).contiguous())
    k = heads(m.k_pool(m.k_lif(_over_time(m.k_bn, _over_time(m.k_conv, s)))).contiguous())
    v = heads(m.v_pool(m.v_lif(_over_time(m.v_bn, _over_time(m.v_conv, s)))).contiguous())
    kv = m.kv_pool(k * v).sum(dim=3, keepdim=True)
    y = m.x_pool(q * m.talking_heads_lif(kv))
    y = y.transpose(3, 4).reshape(T, B, D, H, W).contiguous()
    return _over_time(m.proj_bn, _over_time(m.proj_conv, y)) + x


def _mlp(m: MS_MLP_Conv, x: Tensor) -> Tensor:
    a = _over_time(m.fc1_bn, _over_time(m.fc1_conv, m.fc1_lif(x)))
    if m.shortcut_after_fc1:
        x = a = a + x
    return _over_time(m.fc2_bn, _over_time(m.fc2_conv, m.fc2_lif(a))) + x
