"""What works on this machine, and why not where it does not: `python -m utils.doctor`.

One page to read, or to paste into an issue. It ends with status 1 where something is broken that training or
evaluation needs here, else with 0. Each check runs in a process of its own kind: what crashes, hangs or cannot be
imported, torch included, becomes a line of the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils import ROOT
from utils.errors import run_script

# works; cannot be used, and this machine does not need it; broken.
STATES = ("works", "not here", "BROKEN")
OLDEST, NEWEST_TESTED = (3, 11), (3, 12)
INSTALL = "install the packages again: python -m pip install -r requirements.txt"
# Longest time between two answers; compiling the kernels for the first time takes the most.
PATIENCE = 180.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    topic: str
    state: str  # one of STATES
    text: str  # version, and what was tried or the reason
    remedy: str = ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of speed (10 seconds)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where the data sets are (default: data)")
    parser.add_argument("--answer", help=argparse.SUPPRESS)  # in a child: these checks, after each other
    args = parser.parse_args(argv)
    if args.answer:
        return _answer(args.answer.split(";"), args.data_dir)
    findings = list(examine(args.data_dir, speed=not args.no_speed))
    broken = [finding for finding in findings if finding.state == "BROKEN"]
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(page(findings))
    return 1 if broken else 0


def examine(data_dir: str = "data", *, speed: bool = True) -> Iterator[Finding]:
    """Every finding, in the order of the page."""
    yield from system()
    yield from requirements()
    from utils.run.machine_checks import CHECKS, NEEDS  # names only; imports nothing heavy

    left = [name for name in CHECKS if speed or name != "speed"]
    broken: set[str] = set()
    while left:
        answered = 0
        for name, findings in _ask(left, data_dir):
            yield from findings
            answered += 1
            if any(finding.state == "BROKEN" for finding in findings):
                broken.add(name)
                break
        left = left[answered:]
        skipped = [name for name in left if broken & set(NEEDS.get(name, ()))]
        left = [name for name in left if name not in skipped]
        if skipped:
            yield Finding("not tried", "not here", f"what needs {' or '.join(sorted(broken))}: {'; '.join(skipped)}")


def page(findings: list[Finding]) -> str:
    """The findings as text, what is broken once more at its end."""
    wide = max(len(finding.topic) for finding in findings)
    lines = ["Spike-driven Transformer: what works on this machine", ""]
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        lines.append(f"{finding.topic:{wide}}  {finding.state:8}  {finding.text}{remedy}")
    broken = [finding for finding in findings if finding.state == "BROKEN"]
    lines += ["", f"{len(broken)} broken" + (":" if broken else ": nothing that training or evaluation needs here")]
    lines += [f"  {finding.topic}: {finding.text}; {finding.remedy or 'see above'}" for finding in broken]
    return "\n".join(lines)


def system() -> Iterator[Finding]:
    """The machine and the interpreter; no package is needed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = [f"{platform.system()} {platform.release()} {platform.machine()}", _cpu_name(), f"{cores} cores"]
    yield Finding("system", "works", ", ".join(filter(None, [*facts, _memory(), _shared_memory()])))
    version = sys.version_info[:2]
    text = f"{platform.python_version()} ({sys.executable})"
    if version < OLDEST:
        yield Finding("python", "BROKEN", text, f"use Python {OLDEST[0]}.{OLDEST[1]} or newer")
    else:
        untested = "" if version <= NEWEST_TESTED else "; this version is not tested"
        yield Finding("python", "works", text + untested)
    for language, variable, names in (("C", "CC", ("cc", "gcc", "clang")), ("C++", "CXX", ("c++", "g++", "clang++"))):
        name = os.environ.get(variable) or next(filter(shutil.which, names), "")
        found = shutil.which(name.split()[0]) if name.split() else None
        if found:
            yield Finding(f"compiler, {language}", "works", _first_output([found, "--version"]) or found)
        else:
            reason = f"{variable}={name!r} is no program" if name else f"none of {', '.join(names)} is installed"
            remedy = f"for faster training on a CPU install one, or set {variable}"
            yield Finding(f"compiler, {language}", "not here", reason, remedy)


def requirements() -> Iterator[Finding]:
    """Whether what requirements.txt asks for is installed, by the packages' own records."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("requirements", "BROKEN", "the package 'packaging' is missing", INSTALL)
        return
    wrong = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((wanted.name, f"{wanted.name} is not installed"))
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append((wanted.name, f"{wanted.name} {version} is not {wanted.specifier}"))
    if not wrong:
        yield Finding("requirements", "works", "all of requirements.txt is installed")
    for name, text in wrong:
        # CuPy of another CUDA version has another name, and is only for GPUs.
        optional = name.startswith("cupy")
        yield Finding("requirements", "not here" if optional else "BROKEN", text, "" if optional else INSTALL)


def _ask(names: list[str], data_dir: str) -> Iterator[tuple[str, list[Finding]]]:
    """The answers of one child process, check by check; one that ends or hangs gives a finding of its own and no more.

    The rest is then for the next child.
    """
    command = [sys.executable, "-m", "utils.doctor", "--answer", ";".join(names), "--data-dir", data_dir]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout
    assert child.stderr
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    try:
        for name in names:
            watch = threading.Timer(PATIENCE, child.kill)
            watch.start()
            line = next((text for text in child.stdout if text.startswith('{"check"')), "")
            hung = not watch.is_alive()
            watch.cancel()
            if line:
                yield name, [Finding(**finding) for finding in json.loads(line)["findings"]]
                continue
            child.wait()
            reader.join(5)
            yield name, [Finding(name, "BROKEN", _how_it_ended(child.returncode, hung, errors), INSTALL)]
            return
    finally:
        child.kill()
        child.wait()


def _how_it_ended(status: int, hung: bool, errors: list[str]) -> str:
    if hung:
        return f"no answer within {PATIENCE:.0f} s"
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    last = next((text.strip() for text in reversed(errors) if text.strip()), "no message")
    return f"the process ended with status {status}: {last}"


def _answer(names: list[str], data_dir: str) -> int:
    """In a child: run these checks, and print a line of JSON after each."""
    from utils.run.machine_checks import CHECKS, NEEDS_MODEL, Unusable

    for name in names:
        found: list[dict[str, Any]] = []
        try:
            if name in NEEDS_MODEL:
                import model  # noqa: F401 -- registers the models
            for topic, text in CHECKS[name](data_dir):
                found.append(asdict(Finding(topic, "works", text)))
        except Unusable as reason:
            state = "not here" if reason.harmless else "BROKEN"
            found += [asdict(Finding(name, state, str(reason), reason.remedy))]
        except Exception as error:
            text = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            remedy = INSTALL if isinstance(error, (ImportError, OSError)) else "see what this page says above it"
            found += [asdict(Finding(name, "BROKEN", text, remedy))]
        print(json.dumps({"check": name, "findings": found}), flush=True)
    return 0


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").is_file():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(errors="replace"))
        return match[1] if match else ""
    return platform.processor()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB memory"
    except (AttributeError, ValueError, OSError):
        return ""


def _shared_memory() -> str:
    """Loader workers hand their batches over through it; containers often have 64 MiB only."""
    try:
        size = shutil.disk_usage("/dev/shm").total / 2**20
    except OSError:
        return ""
    return f"{size:,.0f} MiB shared memory" + (" (little: use workers: 0)" if size < 256 else "")


def _first_output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.strip().splitlines()), "")


if __name__ == "__main__":
    run_script(main)
