"""Builds the event-driven kernels (module/csrc/event) with the system's C compiler, once, and loads them.

Nothing happens at import. The first use compiles in a few seconds into a cache folder; its file name is a hash of
sources, compiler, flags and processor, so that an outdated or foreign build is never picked up. Where there is no
compiler, or the build fails, `load` says why and the callers compute densely.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc" / "event"
# Multiplications and additions stay apart: a fused neuron must round as the plain one does.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi")
# Tried in this order; each leaves out something that a compiler or system may lack.
VARIANTS = (("-fopenmp", "-DEVENT_CLONES"), ("-fopenmp", "-march=native"), ("-fopenmp",), ())
_BUILD_SECONDS = 300


class EngineUnavailableError(RuntimeError):
    """The event-driven kernels cannot be built or loaded here; the message says why, in one line."""


def cache_folder() -> Path:
    """Where builds are kept: SDT_CACHE_DIR if it is set, else the user's cache folder."""
    base = os.environ.get("SDT_CACHE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spike-driven-transformer"


def compiler() -> str:
    """The C compiler's path: CC if it is set, else cc, gcc or clang.

    Raises:
        EngineUnavailableError: there is none.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise EngineUnavailableError(f"no C compiler found (tried {', '.join(names)}); install gcc or clang, or set CC")


def _openmp_runtime() -> str | None:
    """The OpenMP library this process already uses through torch.

    Linking the same one gives one pool of threads; two pools would wait for each other's spinning threads.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[-1] for line in lines]
    return next((path for path in paths if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", path)), None)


def _run(command: list[str]) -> str | None:
    """None on success, else the reason of the failure in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return f"{command[0]} ended with {done.returncode}: {lines[0].strip() if lines else 'no message'}"


def _link_flags(variant: tuple[str, ...]) -> list[list[str]]:
    """The ways to link OpenMP, best first."""
    if "-fopenmp" not in variant:
        return [[]]
    runtime = _openmp_runtime()
    return [[runtime], ["-fopenmp"]] if runtime else [["-fopenmp"]]


def build(
    folder: Path, cc: str, flags: tuple[str, ...] = FLAGS, variants: tuple[tuple[str, ...], ...] = VARIANTS
) -> Path:
    """The shared library in `folder`, compiled if it is not there yet.

    Two processes may build at once: each compiles into a file of its own and renames it, which is atomic.

    Raises:
        EngineUnavailableError: no variant could be compiled, or the folder cannot be written.
    """
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256()
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    version = _version(cc)
    digest.update(repr((cc, version, flags, variants, platform.machine(), _processor(), _openmp_runtime())).encode())
    library = folder / f"event_{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    reason: str | None = "nothing to try"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            objects = [str(Path(scratch) / f"{path.stem}.o") for path in sources]
            made = Path(scratch) / "event.so"
            for variant in variants:
                compile_flags = [*(flag for flag in flags if flag != "-shared"), *variant]
                reason = None
                for source, target in zip(sources, objects, strict=True):
                    reason = reason or _run([cc, *compile_flags, "-c", str(source), "-o", target])
                for link in [] if reason else _link_flags(variant):
                    reason = _run([cc, "-shared", *objects, "-o", str(made), *link])
                    if reason is None and (reason := _loads(made)) is None:
                        os.replace(made, library)
                        return library
    except OSError as error:
        raise EngineUnavailableError(f"{folder} cannot be written: {error.strerror}; set SDT_CACHE_DIR") from error
    raise EngineUnavailableError(f"the kernels did not compile: {reason}")


@functools.cache
def _processor() -> str:
    """The instruction sets of this processor: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _version(cc: str) -> str:
    try:
        return subprocess.run([cc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _loads(path: Path) -> str | None:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


_I64, _I32, _F32, _PTR = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
# name -> result, arguments; as declared in module/csrc/event
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "event_pack": (_I64, [_PTR, _I32, _I32, _I64, _I64, _I64, _PTR, _I32]),
    "event_count": (_I64, [_PTR, _I64, _I32]),
    "event_unpack": (None, [_PTR, _I64, _I64, _PTR, _I32]),
    "event_pool": (None, [_PTR, _I64, _I64, _I64, _I64, _PTR, _I32]),
    "event_pack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "event_unpack_weights": (None, [_PTR, _I64, _I64, _I32, _PTR, _I32]),
    "event_forward": (
        _I64,
        [_PTR, *[_I64] * 6, _I32, _PTR, _PTR, _PTR, _PTR, _I32, _PTR, _F32, _F32, _I32],
    ),
    "event_weight_grad": (_I64, [_PTR, *[_I64] * 5, _I32, _PTR, _I32, _PTR, _I32]),
    "event_lif": (None, [_PTR, *[_I64] * 4, _F32, _F32, _PTR, _I32]),
    "event_attention": (_I64, [_PTR, _PTR, _PTR, *[_I64] * 4, _F32, _F32, _I32]),
}


@functools.cache
def load_library(path: Path) -> ctypes.CDLL:
    """A built library with the types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def _load_or_reason() -> ctypes.CDLL | str:
    try:
        return load_library(build(cache_folder(), compiler()))
    except EngineUnavailableError as error:
        return str(error)


def load() -> ctypes.CDLL:
    """The kernels, built if need be; the outcome is kept for the process.

    Raises:
        EngineUnavailableError: with the reason.
    """
    outcome = _load_or_reason()
    if isinstance(outcome, str):
        raise EngineUnavailableError(outcome)
    return outcome
