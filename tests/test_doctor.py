"""`python -m utils.doctor` says what works, and names the true reason where something does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import utils.doctor as doctor
from utils.run import machine_checks
from utils.run.machine_checks import CHECKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def broken(tmp_path):
    """Makes an environment in which importing a package runs some code instead."""

    def environment(package: str, code: str) -> dict[str, str]:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    return environment


def run(*options, env, cwd=ROOT):
    """The status and the findings by topic, of the command's JSON."""
    command = [sys.executable, "-m", "utils.doctor", "--json", "--no-speed", *options]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] is (done.returncode == 0)
    return done.returncode, {finding["topic"]: finding for finding in report["findings"]}


def answers(names, env):
    """What a child finds out about these checks."""
    command = [sys.executable, "-m", "utils.doctor", "--answer", ";".join(names)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["check"]: line["findings"] for line in lines}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os; os._exit(7)", "ended with status 7"),
    ],
    ids=["import error", "crash", "exit"],
)
def test_a_torch_that_cannot_be_imported_is_one_finding(broken, tmp_path, code, reason):
    status, found = run(env=broken("torch", code), cwd=tmp_path)  # from another folder
    assert status == 1
    assert found["torch"]["state"] == "BROKEN"
    assert reason in found["torch"]["text"]
    assert "requirements.txt" in found["torch"]["remedy"]
    assert found["numpy"]["state"] == "works"  # the rest was tried all the same
    assert "torchvision" in found["not tried"]["text"]
    assert [topic for topic, finding in found.items() if finding["state"] == "BROKEN"] == ["torch"]


def test_a_torchvision_of_another_release_is_named_as_such(broken):
    env = broken("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    (finding,) = answers(["torchvision"], env)["torchvision"]
    assert finding["state"] == "BROKEN"
    assert "nms does not exist" in finding["text"]
    assert "--force-reinstall torch torchvision" in finding["remedy"]


def test_a_broken_cupy_gives_its_reason_and_breaks_nothing_else(broken):
    found = answers(["cupy", "spikingjelly"], broken("cupy", "raise ImportError('libcuda.so.1 not found')"))
    (cupy,), (neurons,) = found["cupy"], found["spikingjelly"]
    assert (cupy["state"], neurons["state"]) == ("not here", "works")
    assert "libcuda.so.1 not found" in cupy["text"]
    assert "cupy-cuda12x" in cupy["remedy"]


def test_without_a_compiler_the_reason_is_there_and_auto_chooses_something_else(tmp_path):
    env = os.environ | {"PATH": str(tmp_path), "SDT_CACHE_DIR": str(tmp_path / "cache"), "CC": "", "CXX": ""}
    found = answers(["neurons, cpp", "auto"], env)
    (cpp,) = found["neurons, cpp"]
    assert cpp["state"] == "not here"
    assert "compiler" in cpp["text"]
    runs = {finding["topic"]: finding["text"] for finding in found["auto"]}
    assert runs["auto, LIF"].startswith("lean")


def test_every_check_answers_where_all_is_well(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_checks, "_SPEED_SECONDS", 0.0)
    names = [name for name in CHECKS if not name.startswith("two processes")]
    assert doctor._answer(names, str(tmp_path)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["check"] for line in lines] == names
    found = {finding["topic"]: finding for line in lines for finding in line["findings"]}
    assert not [finding for finding in found.values() if finding["state"] == "BROKEN"]
    assert found["data, digits"]["text"] == "1,437 training samples"
    assert str(tmp_path) in found["data, torch/cifar10"]["text"]
    assert {"auto, MS_SPS", "auto, LIF"} <= set(found)


def test_two_processes_add_their_numbers():
    assert list(CHECKS["two processes, gloo"]("")) == [("two processes, gloo", "all-reduce")]


def test_two_processes_that_cannot_talk_give_the_reason(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    with pytest.raises(machine_checks.Unusable, match=r"no_such_interface|interface|address"):
        list(CHECKS["two processes, gloo"](""))


def test_a_package_of_another_version_than_required_is_named(monkeypatch):
    versions = {"timm": "0.6.13"}
    true_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or true_version(name))
    (finding,) = doctor.requirements()
    assert finding.state == "BROKEN"
    assert "timm 0.6.13 is not" in finding.text


def test_a_driver_with_a_torch_for_cpus_only_is_broken(monkeypatch):
    import torch

    monkeypatch.setattr(machine_checks, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(machine_checks.Unusable, match="built for CPUs only") as raised:
        list(CHECKS["cuda"](""))
    assert not raised.value.harmless


def test_the_page_repeats_what_is_broken_at_its_end():
    findings = [doctor.Finding("a", "works", "1.0"), doctor.Finding("b", "BROKEN", "a reason", "a remedy")]
    assert doctor.page(findings).splitlines()[-2:] == ["1 broken:", "  b: a reason; a remedy"]
