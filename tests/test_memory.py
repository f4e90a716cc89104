"""What a run needs at least, found without taking it, and what is refused for it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import TINY_RUN

import model  # noqa: F401 -- registers the models
from utils.config.parse import config_from
from utils.errors import UserError, run_script
from utils.measure.measurement import Measurement
from utils.run import memory
from utils.run.build import build_model
from utils.run.checkpoint import write_checkpoint
from utils.run.distributed import Process
from utils.run.memory import Need, evaluation_need, memory_of, refuse_what_does_not_fit, training_need

CPU = torch.device("cpu")


def tiny(**values):
    return config_from(yaml.safe_load(TINY_RUN) | values)


@pytest.mark.parametrize(
    ("settings", "moments"), [({"opt": "adamw"}, 2), ({}, 1), ({"momentum": 0}, 0), ({"opt": "lookahead_lamb"}, 2)]
)
def test_weights_gradients_and_moments_are_those_of_the_model(settings, moments):
    cfg = tiny(model_ema=True, **settings)
    parameters, need = build_model(cfg), training_need(cfg)
    trained = sum(p.numel() * 4 for p in parameters.parameters() if p.requires_grad)
    state = sum(v.numel() * v.element_size() for v in (*parameters.parameters(), *parameters.buffers()))
    assert (need.weights, need.gradients, need.optimizer, need.average) == (state, trained, moments * trained, state)


@pytest.mark.parametrize(
    ("settings", "batch", "activation"),
    [
        # 8 channels of the third convolution, 8 x 8, two time steps, four bytes
        ({}, 240 * 8 * 8 * 4, 240 * 2 * 8 * 8 * 8 * 4),
        ({"amp": True}, 240 * 8 * 8 * 4, 240 * 2 * 8 * 8 * 8 * 2),
        ({"aug_splits": 2, "time_steps": 5}, 480 * 8 * 8 * 4, 480 * 5 * 8 * 8 * 8 * 4),
        (
            {"dataset": "digits-dvs", "in_channels": 2, "img_size": 16},
            240 * 2 * 2 * 16 * 16 * 4,
            240 * 2 * 8 * 16 * 16 * 4,
        ),
    ],
)
def test_the_batch_and_the_largest_activation_are_counted(settings, batch, activation):
    need = training_need(tiny(**settings))
    assert (need.batch, need.activation) == (batch, activation)


@pytest.mark.parametrize(
    "settings", [{"dim": 65536}, {"layer": 9, "dim": 32768}, {"batch_size": 1_000_000, "time_steps": 999}]
)
def test_what_no_machine_has_is_refused_with_the_estimate(settings):
    with pytest.raises(UserError, match=r"does not fit: it needs at least .* GiB \(weights .*; make batch_size \(now"):
        refuse_what_does_not_fit(tiny(**settings), CPU)


def test_the_limit_is_the_total(monkeypatch):
    total = training_need(tiny()).total
    for size, fits in ((total, True), (total - 1, False)):
        monkeypatch.setattr(memory, "memory_of", lambda device, size=size: {"this machine": size})
        if fits:
            need = refuse_what_does_not_fit(tiny(), CPU)
            assert need is not None
            assert need.total == total == sum(dataclasses.astuple(need))
        else:
            with pytest.raises(UserError, match="and this machine has"):
                refuse_what_does_not_fit(tiny(), CPU)


def test_an_evaluation_needs_no_gradients():
    cfg = tiny(opt="adamw", model_ema=True, time_steps=3, img_size=16)
    need, training = evaluation_need(cfg, 7), training_need(cfg)
    assert need == Need(training.weights, batch=7 * 16 * 16 * 4, activation=7 * 3 * 8 * 16 * 16 * 4)


@pytest.mark.parametrize(
    ("room", "refused"),
    [
        (0, "at least .*weights"),  # before the model is built
        (800_000, r"val_batch_size \(now 200\), time_steps \(now 2\)"),
        (1_000_000, None),
    ],
)
def test_a_measurement_that_does_not_fit_is_refused(monkeypatch, tmp_path, room, refused):
    """Weights, 200 images and their largest activation are 0.9 MB."""
    write_checkpoint(tmp_path / "a.pth.tar", {"state_dict": build_model(tiny()).state_dict()})
    cfg = tiny(resume=str(tmp_path / "a.pth.tar"), val_batch_size=200, workers=0, device="cpu", kernels="plain")
    monkeypatch.setattr(memory, "memory_of", lambda device: {"this machine": room})
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        Measurement(cfg, Process(0, 1, CPU)).evaluate()


def test_a_batch_of_all_samples_needs_no_more_than_they(monkeypatch, tmp_path):
    write_checkpoint(tmp_path / "a.pth.tar", {"state_dict": build_model(tiny()).state_dict()})
    cfg = tiny(resume=str(tmp_path / "a.pth.tar"), val_batch_size=10**6, workers=0, device="cpu", kernels="plain")
    assert len(Measurement(cfg, Process(0, 1, CPU)).evaluate().firing) > 0


def test_the_estimate_does_not_change_the_first_weights():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    training_need(tiny())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_of_a_plugin_is_not_estimated(monkeypatch):
    monkeypatch.setattr(memory, "is_ours", lambda cfg: False)
    assert refuse_what_does_not_fit(tiny(), CPU) is None


def test_the_limits_of_a_container_and_of_the_shell_count(monkeypatch, tmp_path):
    import resource

    (tmp_path / "memory.max").write_text("123456\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "missing")))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**50, resource.RLIM_INFINITY))
    found = memory_of(CPU)
    assert found["this container"] == 123456
    assert found["this process (ulimit -v)"] < 2**50
    assert found["this machine"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("max\n")
    assert "this container" not in memory_of(CPU)


def test_a_gpu_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=5))
    assert memory_of(torch.device("cuda", 0)) == {"the GPU": 5}


def test_the_estimate_in_words():
    words = str(Need(weights=3 * 2**30, activation=2**20))
    assert words == "at least 3.0 GiB (weights 3.0 GiB, largest activation 1.0 MiB)"


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
    ],
)
def test_too_little_memory_is_one_line_and_status_2(error, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: error: out of memory: ")


def test_another_runtime_error_keeps_its_traceback():
    def main(argv):
        raise RuntimeError(os.strerror(errno.EINVAL))

    with pytest.raises(RuntimeError):
        run_script(main)
