"""The compiled kernels of sparse convolutions: module/kernels/csrc/sparse, as C functions with their types.

Where they cannot be compiled, `load` says why in one line and the callers compute densely.
"""

from __future__ import annotations

import ctypes
import functools

from module.kernels import native

LIBRARY = native.Library(
    name="sparse",
    sources=("sparse/forward.c", "sparse/neuron.c", "sparse/pack.c", "sparse/weight_grad.c"),
)

_I64, _I32, _F32, _PTR = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
# name -> result, arguments; as declared in module/kernels/csrc/sparse
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sparse_pack": (_I64, [_PTR, _I32, _I32, _I64, _I64, _I64, _PTR, _I32]),
    "sparse_count": (_I64, [_PTR, _I64, _I32]),
    "sparse_unpack": (None, [_PTR, _I64, _I64, _PTR, _I32]),
    "sparse_pool": (None, [_PTR, _I64, _I64, _I64, _I64, _PTR, _I32]),
    "sparse_pack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "sparse_unpack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "sparse_forward": (
        _I64,
        [_PTR, *[_I64] * 6, _I32, _PTR, _PTR, _PTR, _PTR, _I32, _PTR, _F32, _F32, _I32],
    ),
    "sparse_weight_grad": (_I64, [_PTR, *[_I64] * 5, _I32, _PTR, _I32, _PTR, _I32]),
    "sparse_lif": (None, [_PTR, *[_I64] * 4, _F32, _F32, _PTR, _I32]),
    "sparse_attention": (_I64, [_PTR, _PTR, _PTR, *[_I64] * 4, _F32, _F32, _I32]),
}


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels, compiled if need be.

    Raises:
        NativeError: with the reason.
    """
    return typed(native.load(LIBRARY))
