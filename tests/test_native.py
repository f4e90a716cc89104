"""The builder of the compiled kernels: what it reuses, what it never reuses, and what it says where it cannot work."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from module.kernels import cpu as cpu_kernels
from module.kernels import native
from module.kernels.native import Library, NativeError
from module.sparse import library as event_kernels

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (any(map(shutil.which, ("cc", "gcc", "clang"))) and any(map(shutil.which, ("c++", "g++", "clang++")))),
    reason="no C and C++ compiler: every kernel has a fallback in torch",
)
C = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'
CPP = '#include "answer.h"\nextern "C" int answer() { auto value = ANSWER; return value; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    native._outcome.cache_clear()
    yield tmp_path / "cache"
    native._outcome.cache_clear()


@pytest.fixture
def library(tmp_path):
    """A library of one C file and one header; nothing of it is in the repository."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#ifndef ANSWER\n#define ANSWER 42\n#endif\n")
    (folder / "answer.c").write_text(C)
    (folder / "answer.cpp").write_text(CPP)
    return Library("answer", (str(folder / "answer.c"),), variants=((),))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


@pytest.mark.parametrize("suffix", ["c", "cpp"])
def test_the_suffix_decides_the_language(library, cache, suffix):
    other = dataclasses.replace(library, sources=(library.sources[0].replace("answer.c", f"answer.{suffix}"),))
    assert native.load(other).answer() == 42
    assert native.load(other) is native.load(other)
    (made,) = cache.iterdir()
    assert made.name.startswith("answer-")


def test_what_changes_the_result_changes_the_file(library, cache, monkeypatch):
    made = {native.build(library, cache)}
    assert native.build(library, cache) in made
    for change in (dict(flags=("-DANSWER=7",)), dict(variants=(("-DANSWER=8",),)), dict(name="other")):
        made.add(native.build(dataclasses.replace(library, **change), cache))
    header = Path(library.sources[0]).with_name("answer.h")
    header.write_text(header.read_text().replace("42", "9"))
    made.add(native.build(library, cache))
    for function, value in (("_cpu", "another"), ("_version", "another"), ("_openmp_runtime", None)):
        with monkeypatch.context() as patch:
            patch.setattr(native, function, lambda *_, value=value: value)
            made.add(native.build(library, cache))
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')} -DANSWER=10")
    made.add(native.build(library, cache))
    assert len(made) == 9
    assert sorted(map(answer, made)) == [7, 8, 9, 9, 9, 9, 10, 42, 42]
    assert {path.name for path in cache.iterdir()} == {path.name for path in made}


def test_a_build_is_reused(library, cache):
    first, second = (native.build(library, cache).stat() for _ in range(2))
    assert (first.st_ino, first.st_mtime_ns, first.st_size) == (second.st_ino, second.st_mtime_ns, second.st_size)


def never(file, load, path):
    """Load `path`, which must not be `file`."""
    assert path != file
    return load(path)


@pytest.mark.parametrize("seed", range(3))
def test_a_spoiled_file_is_never_loaded_but_compiled_anew(library, cache, monkeypatch, seed):
    file = native.build(library, cache)
    whole, draw = file.read_bytes(), random.Random(seed)
    place = draw.randrange(len(whole))
    flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
    # Cut short, the loader maps pages that do not exist: the process would die of SIGBUS.
    for content in (whole[:place], flipped, b"", whole[: len(whole) - 72], whole + b"x"):
        file.unlink()  # written in place, it would change under the process that has it loaded
        file.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(native, "_why_not_loaded", functools.partial(never, file, native._why_not_loaded))
            assert native.build(library, cache) == file
        assert answer(file) == 42


def test_the_first_variant_that_compiles_links_and_loads_is_taken(library, cache):
    bad = [("-fno-such-flag",), ("-DANSWER=not_declared",), ("-DANSWER=other()",)]
    Path(library.sources[0]).write_text("int other(void);\n" + C)  # compiles and links, does not load
    several = dataclasses.replace(library, variants=(*bad, ("-DANSWER=1",), ("-DANSWER=2",)))
    assert answer(native.build(several, cache)) == 1


def test_two_processes_at_once_make_one_file(library, cache):
    code = (
        "import sys; from pathlib import Path; from module.kernels.native import Library, build;"
        "print('ready', flush=True); sys.stdin.readline();"
        f"print(build(Library('answer', ({library.sources[0]!r},), variants=((),)), Path({str(cache)!r})))"
    )
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=300)[0].strip() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert [str(path) for path in cache.iterdir()] == [first]
    assert answer(Path(first)) == 42


def test_a_failure_is_one_line_kept_for_the_process_and_not_on_disk(library, cache, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    broken = script(tmp_path / "cc", f"echo call >> {calls}; echo 'cc: error: out of order' >&2; exit 3")
    monkeypatch.setenv("CC", broken)
    with pytest.raises(NativeError, match=r"answer\.c did not compile: .*cc ended with 3: cc: error: out of order$"):
        native.load(library)
    before = calls.read_text()
    with pytest.raises(NativeError, match="out of order"):
        native.load(library)
    assert calls.read_text() == before, "asked once per process"
    assert list(cache.iterdir()) == [], "nothing half made is left"
    monkeypatch.delenv("CC")
    native._outcome.cache_clear()  # as in the next process
    assert native.load(library).answer() == 42


@pytest.mark.parametrize(("suffix", "variable"), [("c", "CC"), ("cpp", "CXX")])
def test_a_compiler_that_is_no_command_is_named_with_its_variable(library, cache, monkeypatch, suffix, variable):
    monkeypatch.setenv(variable, "'")
    other = dataclasses.replace(library, sources=(library.sources[0].replace("answer.c", f"answer.{suffix}"),))
    with pytest.raises(NativeError, match=rf"""^{variable} is "'", which is no command \(No closing quotation\)"""):
        native.load(other)


@pytest.mark.parametrize(("suffix", "name", "variable"), [("c", "C", "CC"), ("cpp", r"C\+\+", "CXX")])
def test_no_compiler(library, cache, monkeypatch, suffix, name, variable):
    monkeypatch.setenv(variable, "no-such-compiler")
    other = dataclasses.replace(library, sources=(library.sources[0].replace("answer.c", f"answer.{suffix}"),))
    with pytest.raises(
        NativeError, match=rf"^no {name} compiler found \(looked for no-such-compiler\).*set {variable}$"
    ):
        native.load(other)


def test_a_cache_that_cannot_be_written(library, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(NativeError, match=rf"{cache} cannot be written \(.*\); set SDT_CACHE_DIR$"):
        native.load(library)


def test_a_cache_that_cannot_be_written_is_good_for_what_it_holds(library, cache, monkeypatch):
    made = native.build(library, cache)
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", lambda **_: pytest.fail("wrote"))
    assert native.build(library, cache) == made


def test_no_home_folder(monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", native.CACHE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(NativeError, match=r"\(no home\); set SDT_CACHE_DIR$"):
        native.cache_folder()


def test_flags_for_the_cpu_at_hand():
    arm, x86 = native.native_variants("aarch64"), native.native_variants("x86_64")
    assert arm[0] == ("-mcpu=native", "-fopenmp")
    assert x86[0] == ("-march=native", "-fopenmp")
    assert not any("-mcpu=native" in variant for variant in x86)
    assert arm[-1] == x86[-1] == ()


def test_openmp_is_torchs_own_though_other_packages_bring_theirs(tmp_path):
    packages = Path(torch.__file__).parent.parent
    names = (
        f"{packages}/aaa.libs/libgomp-1.so.1",
        f"{packages}/torch/lib/libgomp-2.so.1",
        "/usr/lib/libiomp5.so",
        "/usr/lib/libm.so",
    )
    maps = tmp_path / "maps"
    maps.write_text("".join(f"7f00-7f01 r-xp 00000000 08:01 1234    {name}\n" for name in names))
    assert native._openmp_runtime(maps) == names[1]
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 1234    {names[2]}\n7f00-7f01 rw-p 00000000 00:00 0\n")
    assert native._openmp_runtime(maps) == names[2]
    assert native._openmp_runtime(tmp_path / "none") is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_the_kernels_bring_no_second_openmp_runtime():
    compilers = [native._compiler(library.language) for library in (event_kernels.LIBRARY, cpu_kernels.LIBRARY)]
    if any("clang" in native._version(compiler) for compiler in compilers):
        pytest.skip("clang's code does not run on GCC's libgomp, which torch may have")
    code = (
        "import torch; from module.kernels import cpu; from module.sparse import library;"
        "loaded = lambda: {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]};"
        "before = loaded(); assert library.load(); assert cpu.why_unusable() is None;"
        "assert before; assert {n for n in loaded() if 'libgomp' in n or 'libomp' in n or 'iomp' in n} <= before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_model_without_compilers_runs_on_torch_and_says_why_in_one_line_each(tmp_path):
    code = (
        "import torch; from model import sdt; from module.accelerate import accelerate, for_evaluation;"
        "model = sdt(img_size_h=16, img_size_w=16, num_classes=5, embed_dims=8, num_heads=1,"
        " depths=1, T=2, pooling_stat='1111').eval();"
        "accelerate(model, engine='sparse'); assert for_evaluation(model) is model;"
        "runs = [model(torch.ones(1, 3, 16, 16))[0] for _ in range(2)];"
        "print(torch.equal(*runs), {type(m).__name__ for m in model.modules()} & {'SparseConv2d'})"
    )
    environment = {
        "CC": script(tmp_path / "cc", "echo 'cc: error: out of order' >&2; exit 1"),
        "CXX": "no-such-compiler",
        native.CACHE_VARIABLE: str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True set()\n"
    (dense,) = [line for line in done.stderr.splitlines() if "stay dense" in line]
    assert "out of order" in dense
    (neurons,) = [line for line in done.stderr.splitlines() if "neurons do not run on cpp" in line]
    assert "no C++ compiler found (looked for no-such-compiler)" in neurons


@pytest.mark.parametrize("library", [event_kernels.LIBRARY, cpu_kernels.LIBRARY], ids=lambda library: library.name)
def test_every_source_of_the_repository_is_in_its_library(library):
    (folder,), (suffix,) = {path.parent for path in library.paths}, {path.suffix for path in library.paths}
    assert sorted(library.paths) == sorted(folder.glob(f"*{suffix}"))
