"""Compile the project's own C++ for this CPU on first use, and load it.

Plain functions called through ctypes: no build step at installation, no torch headers (which take minutes), and a
clear reason where it cannot be done. The library lands in a cache folder under a name made from the sources, the
compiler, its flags and the CPU, so nothing stale is ever loaded, also from a home directory that different
machines share.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "SDT_CACHE_DIR"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# The first set that the compiler takes: ARM compilers know -mcpu only, some have no OpenMP (one thread then).
_OPTIONAL = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_COMPILERS = ("c++", "g++", "clang++")


class NativeError(RuntimeError):
    """The library could not be compiled or loaded; the message is one line with the reason."""


def cache_folder() -> Path:
    """`$SDT_CACHE_DIR`, else the user's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spike-driven-transformer"


@functools.cache
def load(*names: str) -> ctypes.CDLL:
    """The library made from the C++ files `names` in module/csrc.

    Raises:
        NativeError: no compiler, a compiler error, or a library that does not load; with the reason. (Not cached:
            a compiler installed meanwhile is found.)
    """
    compiler = _compiler()
    identity = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.h")) + [SOURCES / name for name in names]:
        identity.update(path.read_bytes())
    identity.update(f"{compiler}{_version(compiler)}{_FLAGS}{_OPTIONAL}{_cpu()}".encode())
    library = cache_folder() / f"{Path(names[0]).stem}-{identity.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(compiler, names, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeError(f"{library} does not load: {error}") from error


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise NativeError(f"no C++ compiler found (looked for {', '.join(wanted)})")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, names: tuple[str, ...], library: Path) -> None:
    """Compile in a folder of its own, then rename: two processes may do so at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=library.parent)
    except OSError as error:
        raise NativeError(
            f"the cache folder {library.parent} cannot be written ({error}); set {CACHE_VARIABLE}"
        ) from error
    try:
        made = Path(folder) / "library.so"
        problem = ""
        for optional in _OPTIONAL:
            # Linked without -fopenmp: torch has loaded its own OpenMP runtime for all to see, and a second one
            # beside it would fight over the cores. Compiled and linked apart for that reason alone.
            objects = [str(Path(folder) / f"{name}.o") for name in names]
            commands = [
                [compiler, *_FLAGS, *optional, "-c", str(SOURCES / name), "-o", to]
                for name, to in zip(names, objects, strict=True)
            ]
            for link in (["-shared"], ["-shared", "-fopenmp"]):
                problem = _run([*commands, [compiler, *link, *objects, "-o", str(made)]]) or _loads(made)
                if not problem:
                    made.replace(library)
                    return
        raise NativeError(f"{compiler} could not compile {', '.join(names)}: {problem}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(commands: list[list[str]]) -> str:
    """Empty, or the first line that says why a command failed."""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return next((line for line in lines if "error" in line), lines[0])
    return ""


def _loads(library: Path) -> str:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    except OSError as error:
        return str(error)
    return ""
