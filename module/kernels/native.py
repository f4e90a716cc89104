"""Compile the project's own C and C++ for this CPU on first use, and load it.

The functions are called through ctypes, so there is no build step at installation, and torch's headers (which take
minutes to compile) are not needed. A library is kept in a cache folder. Its name is made from its sources, the
compiler, the flags, the CPU and the OpenMP runtime, so a library of other sources or of another machine is not loaded.

A process that failed to build a library does not try again: a failing compiler may take minutes, and a run must not
change its arithmetic on the way. The failure is not kept on disk, so the next process tries again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "SDT_CACHE_DIR"
# Multiplications and additions stay apart: a fused neuron must round as the plain one does.
FLAGS = ("-O3", "-fPIC", "-ffp-contract=off")
_SECONDS = 300  # for one run of a compiler


@dataclass(frozen=True)
class _Language:
    name: str
    variable: str  # of the environment, names the compiler
    compilers: tuple[str, ...]
    standard: str


_LANGUAGES = {
    ".c": _Language("C", "CC", ("cc", "gcc", "clang"), "-std=gnu11"),
    ".cpp": _Language("C++", "CXX", ("c++", "g++", "clang++"), "-std=c++17"),
}


class NativeError(RuntimeError):
    """A library cannot be compiled or loaded here; the message is one line with the reason."""


def native_variants(machine: str = platform.machine()) -> tuple[tuple[str, ...], ...]:
    """Sets of flags for the CPU at hand, best first: each leaves out what some compilers or systems lack.

    On Arm -mcpu=native stands for instruction set and tuning (and older clang knows nothing else); on x86 it is only
    an old name of -mtune.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    natives = ("-march=native",) if x86 else ("-mcpu=native", "-march=native")
    return (
        *((native, "-fopenmp") for native in natives),
        ("-fopenmp",),
        *((native, "-fopenmp-simd") for native in natives),  # one thread
        (),
    )


@dataclass(frozen=True)
class Library:
    """What a shared library is made of.

    Attributes:
        name: how its file's name in the cache begins.
        sources: files in module/kernels/csrc, all .c or all .cpp. The headers beside them belong to it.
        flags: in addition to those that every library is compiled with.
        variants: sets of further flags, best first; the first that compiles, links and loads is taken.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    variants: tuple[tuple[str, ...], ...] = native_variants()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(SOURCES / source for source in self.sources)

    @property
    def language(self) -> _Language:
        (suffix,) = {path.suffix for path in self.paths}
        return _LANGUAGES[suffix]


def load(library: Library) -> ctypes.CDLL:
    """The library, compiled if need be. The outcome, a failure included, is kept for the process.

    Raises:
        NativeError: no compiler, a compiler error, a cache folder that cannot be written, or a library that does not
            load.
    """
    outcome = _outcome(library)
    if isinstance(outcome, str):
        raise NativeError(outcome)
    return outcome


@functools.cache
def _outcome(library: Library) -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(build(library, cache_folder())))
    except (NativeError, OSError) as error:
        return str(error)


def cache_folder() -> Path:
    """`$SDT_CACHE_DIR`, else the user's cache folder.

    Raises:
        NativeError: the user has no home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise NativeError(
            f"there is no home folder to keep compiled code in ({error}); set {CACHE_VARIABLE}"
        ) from error
    return base / "spike-driven-transformer"


def build(library: Library, folder: Path) -> Path:
    """The file of the library in `folder`, compiled if it is not there yet, is not whole or does not load.

    Raises:
        NativeError: see `load`.
    """
    language = library.language
    compiler = _compiler(language)
    flags = (language.standard, *FLAGS, *library.flags)
    made_from = (compiler, _version(compiler), flags, library.variants, platform.machine(), _cpu(), _openmp_runtime())
    digest = hashlib.sha256(repr(made_from).encode())
    headers = {header for path in library.paths for header in path.parent.glob("*.h")}
    for file in [*library.paths, *sorted(headers)]:
        digest.update(file.read_bytes())
    target = folder / f"{library.name}-{digest.hexdigest()[:20]}.so"
    if _is_whole(target) and not _why_not_loaded(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Compiled in a folder of its own, then renamed, which is atomic: two processes may do so at once.
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            reason = "there is no set of flags to try"
            for variant in library.variants:
                made = Path(scratch) / "library.so"
                reason = _compile([*compiler, *flags], library.paths, variant, compiler, made)
                if not reason:
                    with made.open("ab") as end:
                        end.write(_checksum(made.read_bytes()))
                    os.replace(made, target)
                    return target
    except OSError as error:
        raise NativeError(
            f"the cache folder {folder} cannot be written ({error.strerror}); set {CACHE_VARIABLE}"
        ) from error
    raise NativeError(f"{', '.join(library.sources)} did not compile: {reason}")


def _checksum(content: bytes) -> bytes:
    """What follows the content of a library in its file; a loader reads no further than the library's own end."""
    return b"SHA-256 " + hashlib.sha256(content).hexdigest().encode()


def _is_whole(path: Path) -> bool:
    """Whether the file has its checksum. To load a library that was cut short ends the process without a message."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    length = len(_checksum(b""))
    return content[-length:] == _checksum(content[:-length])


def _compile(
    command: list[str], sources: tuple[Path, ...], variant: tuple[str, ...], linker: tuple[str, ...], made: Path
) -> str:
    """Compile and link into the file `made`; returns the reason of a failure in one line, or nothing."""
    objects = [str(made.with_name(f"{path.stem}.o")) for path in sources]
    for source, target in zip(sources, objects, strict=True):
        if reason := _run([*command, *variant, "-c", str(source), "-o", target]):
            return reason
    reason = ""
    for link in _link_flags(variant):
        reason = _run([*linker, "-shared", *objects, "-o", str(made), *link]) or _why_not_loaded(made)
        if not reason:
            break
    return reason


def _link_flags(variant: tuple[str, ...]) -> list[list[str]]:
    """The ways to link OpenMP, best first.

    Torch's own runtime gives one pool of threads: two pools would wait for each other's spinning threads.
    """
    if "-fopenmp" not in variant:
        return [[]]
    runtime = _openmp_runtime()
    return [[runtime], ["-fopenmp"]] if runtime else [["-fopenmp"]]


def _openmp_runtime(maps: Path = Path("/proc/self/maps")) -> str | None:
    """The OpenMP library that torch has loaded into this process."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[-1] for line in lines}
    runtimes = sorted(file for file in files if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", file))
    # Other packages bring their own beside it; torch's lies in its folder `torch` or `torch.libs`, if it has one.
    of_torch = [file for file in runtimes if file.startswith(str(Path(torch.__file__).parent))]
    return next(iter(of_torch + runtimes), None)


def _compiler(language: _Language) -> tuple[str, ...]:
    """The compiler's path, and arguments that its environment variable may hold."""
    wanted = [named] if (named := os.environ.get(language.variable, "").strip()) else list(language.compilers)
    for name in wanted:
        try:
            program, *arguments = shlex.split(name)
        except ValueError as error:
            raise NativeError(f"{language.variable} is {name!r}, which is no command ({error}); unset it") from error
        if found := shutil.which(program):
            return (found, *arguments)
    raise NativeError(
        f"no {language.name} compiler found (looked for {', '.join(wanted)}); install gcc or clang, or set "
        f"{language.variable}"
    )


def _version(compiler: tuple[str, ...]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""  # compiling will say what is wrong


@functools.cache
def _cpu() -> str:
    """What -march=native and -mcpu=native depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _run(command: list[str]) -> str:
    """Empty on success, else one line with the reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or ["no message"]
    line = next((line for line in lines if "error" in line), lines[0])
    return f"{command[0]} ended with {done.returncode}: {line.strip()}"


def _why_not_loaded(path: Path) -> str:
    """Empty, or the reason why the library does not load."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return ""
