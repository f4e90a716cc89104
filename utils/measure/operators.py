"""What is known of PyTorch's operators: which ones multiply numbers and sum the products, and which ones do not.

An operator that is in none of these sets is unknown: it may hide any number of products.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch._ops import OpOverload

# Matrix products, by the places of the two factors among the arguments.
MATRIX_PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "vdot": (0, 1), "_int_mm": (0, 1),
    "addmm": (1, 2), "addmv": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "_addmm_activation": (1, 2),
}  # fmt: skip
# All steps of a recurrent layer in one operator; a step multiplies by each weight once.
RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"}
ATTENTION = "_scaled_dot_product"  # how the names of the operators of softmax attention begin

_NEW = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "linspace", "eye", "scalar_tensor",
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "lift_fresh", "tril_indices",
    "triu_indices", "uniform_", "normal_", "bernoulli_", "bernoulli", "random_", "fill_", "zero_",
}  # fmt: skip
# These copy, move or choose values.
_MOVED = {
    "clone", "copy_", "_to_copy", "cat", "stack", "repeat", "expand_copy", "_unsafe_view", "_reshape_copy", "roll",
    "flip", "index", "_unsafe_index", "index_select", "index_put", "index_put_", "_index_put_impl_", "index_copy",
    "index_fill", "gather", "scatter", "scatter_", "select_scatter", "slice_scatter", "embedding", "take",
    "masked_select", "masked_scatter", "repeat_interleave", "constant_pad_nd", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "im2col",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "tril", "triu", "diag_embed",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes", "split_with_sizes_copy", "native_dropout", "resize_", "set_", "contiguous",
    "_pin_memory", "record_stream", "rot90", "unfold_copy",
}  # fmt: skip
# These compare values and choose among them.
_COMPARED = {
    "max", "min", "amax", "amin", "aminmax", "argmax", "argmin", "sort", "topk", "kthvalue", "median", "mode",
    "unique_dim", "_unique2", "unique_consecutive", "nonzero", "count_nonzero", "equal", "any", "all",
    "searchsorted", "bucketize", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "fractional_max_pool2d", "mkldnn_max_pool2d", "mkldnn_max_pool3d", "cummax", "cummin",
    "isin", "bincount", "histc", "_local_scalar_dense", "item", "is_nonzero", "one_hot", "argsort", "_assert_async",
    "_assert_scalar", "allclose",
}  # fmt: skip
_SUMMED = {
    "sum", "nansum", "cumsum", "scatter_add", "scatter_add_", "index_add", "index_add_", "col2im", "scatter_reduce",
    "segment_reduce",
}  # fmt: skip
_AVERAGED = {
    "mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "mkldnn_adaptive_avg_pool2d",
}  # fmt: skip
_BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm_elemt",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
    "_batch_norm_impl_index",
}  # fmt: skip

# Of the element-wise operators: these give 0 and 1, or whole numbers, by comparing with thresholds ...
THRESHOLDS = {
    "gt", "ge", "lt", "le", "eq", "ne", "sign", "sgn", "heaviside", "isnan", "isfinite", "isinf", "signbit",
    "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not",
    "bitwise_xor", "floor", "ceil", "round", "trunc",
}  # fmt: skip
# ... and these choose among the values that enter, or turn their sign.
CHOICES = {
    "neg", "abs", "relu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "where",
    "masked_fill", "threshold", "hardtanh", "positive",
}  # fmt: skip
SUMS = {"add", "sub", "rsub"}
FACTORS = {"mul", "div"}


@functools.cache
def role(func: OpOverload) -> str:
    """`product`, `new`, `moved`, `compared`, `summed`, `averaged`, `batch_norm`, `view`, `elementwise`, or `unknown`.

    An operator of this project's own library is `moved`: it stands for parts of a model that are known, and proved
    itself equal to them.
    """
    name = func.overloadpacket.__name__
    if func.namespace == "sdt":
        return "moved"
    if func.namespace not in ("aten", "prim", "prims"):
        return "unknown"
    if name in MATRIX_PRODUCTS or name in RECURRENT or name == "convolution" or name.startswith(ATTENTION):
        return "product"
    for known, names in (
        ("new", _NEW),
        ("moved", _MOVED),
        ("compared", _COMPARED),
        ("summed", _SUMMED),
        ("averaged", _AVERAGED),
        ("batch_norm", _BATCH_NORMS),
    ):
        if name in names:
            return known
    if func.is_view:
        return "view"
    return "elementwise" if torch.Tag.pointwise in func.tags else "unknown"


def in_words(func: OpOverload) -> str:
    """The name of an operator as a user knows it."""
    name = func.overloadpacket.__name__
    if name.startswith(ATTENTION):
        return "scaled_dot_product_attention"
    name = name.strip("_")
    return name if func.namespace == "aten" else f"{func.namespace}::{name}"


def steps_of_recurrence(args: tuple[Any, ...]) -> tuple[int, int]:
    """Of a call of a `RECURRENT` operator: how many inputs it takes (T x B), and the weights of one step."""
    weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:5]  # of mkldnn_rnn_layer two and two biases
    return math.prod(args[0].shape[:-1]), sum(w.numel() for w in weights if w.dim() == 2)
