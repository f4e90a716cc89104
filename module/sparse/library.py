"""The compiled kernels of sparse convolutions: module/kernels/csrc/sparse, as C functions with their types.

Where they cannot be compiled, `load` says why in one line and the callers compute densely.
"""

from __future__ import annotations

import ctypes
import functools

from module.kernels import native

LIBRARY = native.Library(
    name="sparse",
    sources=tuple(
        f"sparse/{name}.c" for name in ("run", "forward", "lists", "tables", "layers", "pack", "weight_grad")
    ),
)

_I64, _I32, _F32, _PTR = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
RESULTS, PARTS = 3, 3
NONE = -1  # no place, no source
_OUT_OF_MEMORY = -2


class Result(ctypes.Structure):
    """`result` in csrc/sparse/layer.h."""

    _fields_ = (
        *(("weights", _PTR), ("bias", _PTR), ("residual", _I64), ("values", _I64), ("spikes", _I64)),
        *(("decay", _F32), ("threshold", _F32)),
    )


class Layer(ctypes.Structure):
    """`layer` in csrc/sparse/layer.h."""

    _fields_ = (
        *((name, _I32) for name in ("kind", "taps", "dtype", "results")),
        *((name, _I64) for name in ("frames", "T", "N", "H", "W", "C", "O")),
        *((name, _I64) for name in ("input", "keys", "queries", "source", "spikes")),
        ("to", Result * RESULTS),
    )


class Outcome(ctypes.Structure):
    """`outcome` in csrc/sparse/layer.h."""

    _fields_ = (("spikes", _I64), ("additions", _I64), ("seconds", ctypes.c_double), ("parts", ctypes.c_double * PARTS))


IMAGE, CONVOLVE, FIRE, POOL_SPIKES, POOL_VALUES, ATTEND, MEAN = range(7)  # kinds of layers

# name -> result, arguments; as declared in module/kernels/csrc/sparse
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sparse_pack": (_I64, [_PTR, _I32, _I32, _I64, _I64, _I64, _PTR, _I32]),
    "sparse_unpack": (None, [_PTR, _I64, _I64, _PTR, _I32]),
    "sparse_pack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "sparse_unpack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "sparse_run": (_I64, [_PTR, _I64, _PTR, _PTR, _I32]),
    "sparse_weight_grad": (_I64, [_PTR, *[_I64] * 5, _I32, _PTR, _I32, _PTR, _I32]),
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


def checked(result: int) -> int:
    """What the kernels returned; raises MemoryError where they had no memory."""
    if result == _OUT_OF_MEMORY:
        raise MemoryError("the kernels of sparse convolutions could not allocate their lists")
    return result


def run(library: ctypes.CDLL, layers: ctypes.Array[Layer], memory: int | None, threads: int) -> ctypes.Array[Outcome]:
    """Run `layers`, one after the other; places count from the address `memory` (None: from 0)."""
    done = (Outcome * len(layers))()
    checked(library.sparse_run(layers, len(layers), memory, done, threads))
    return done
