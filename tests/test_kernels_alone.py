"""The compiled kernels against loops written from their definitions (tests/kernels), without Python.

With sanitizers on this machine; and for 64-bit Arm, cross-compiled and emulated, with NEON and with SVE, where the
compiler vectorises other loops in another way.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from module.kernels import cpu as cpu_kernels
from module.kernels import native
from module.sparse import library as event_kernels

PROGRAMS = Path(__file__).parent / "kernels"
ARM = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64-static"
# What -mcpu=native means on two of them.
CPUS = {"neon": ("-mcpu=neoverse-n1", "-fopenmp"), "sve": ("-mcpu=neoverse-v1", "-fopenmp")}
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
pytestmark = pytest.mark.slow


def program(
    library: native.Library, prefix: str, flags: tuple[str, ...], folder: Path, sanitizers: tuple[str, ...] = ()
) -> Path:
    """Compile the library's sources with its flags and the checks of that name; no warning is accepted.

    `sanitizers` watch the library, and the memory that the checks hand to it; the checks themselves would take long.
    """
    compiler = {"C": f"{prefix}gcc", "C++": f"{prefix}g++"}[library.language.name]
    objects = [folder / f"{path.stem}.o" for path in library.paths]
    standard = (library.language.standard, *native.FLAGS, *library.flags)
    for path, compiled in zip(library.paths, objects, strict=True):
        run(compiler, *standard, *flags, *sanitizers, "-c", path, "-o", compiled)
    binary, check = folder / library.name, folder / "check.o"
    run(f"{prefix}g++", "-std=c++17", "-O1", "-Wextra", *flags, "-c", PROGRAMS / f"{library.name}.cpp", "-o", check)
    run(f"{prefix}g++", *flags, *sanitizers, check, *objects, "-o", binary)
    return binary


def run(*command: str | Path, warnings: tuple[str, ...] = ("-Wall", "-Werror")) -> None:
    done = subprocess.run([*map(str, command), *warnings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_correct(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = re.fullmatch(r"(\d+) comparisons, 0 failures\n", done.stdout)
    assert counts
    assert int(counts[1]) > 500


@pytest.fixture(params=[event_kernels.LIBRARY, cpu_kernels.LIBRARY], ids=lambda library: library.name)
def library(request):
    return request.param


def test_with_sanitizers(library, tmp_path):
    probe = ["gcc", "-fsanitize=address,undefined", "-fopenmp", "-xc", "-", "-o", str(tmp_path / "probe")]
    if not shutil.which("gcc") or subprocess.run(probe, input=b"int main(void) { return 0; }").returncode:
        pytest.skip("no gcc with sanitizers and OpenMP")
    assert_correct(program(library, "", ("-O1", "-fopenmp"), tmp_path, SANITIZERS))


@pytest.mark.skipif(
    not all(map(shutil.which, (f"{ARM}gcc", f"{ARM}g++", EMULATOR))),
    reason=f"needs {ARM}gcc, {ARM}g++ and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user-static)",
)
@pytest.mark.parametrize("cpu", CPUS)
def test_on_emulated_arm(library, cpu, tmp_path):
    binary = program(library, ARM, CPUS[cpu], tmp_path)
    assert_correct(EMULATOR, "-cpu", "max", "-L", f"/usr/{ARM.removesuffix('-')}", binary)
