"""Which convolutions the compiled kernels know."""

from __future__ import annotations

from torch import nn


def same_size_kernel(conv: nn.Module) -> int | None:
    """k of a plain k x k convolution, k odd, that keeps the size of the map (stride 1, zeros around); else None.

    Exactly nn.Conv2d: a subclass computes something else.
    """
    if type(conv) is not nn.Conv2d or (conv.groups, conv.padding_mode) != (1, "zeros"):
        return None
    k = conv.kernel_size[0]
    expected = ((k, k), (1, 1), (k // 2, k // 2), (1, 1))
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return k if k % 2 and found == expected else None
