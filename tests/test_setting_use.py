"""Which settings each program reads while it works: none that are said to be for the other one alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import processes
import pytest
from tiny import TINY_RUN

from utils.config.parse import config_from
from utils.config.settings import MEASURE, SETTINGS, TRAIN
from utils.train.run_state import _differences

TINY = f"""{TINY_RUN}val_batch_size: 180
workers: 0
device: cpu
epochs: 1
cooldown_epochs: 0
"""
# They copy, compare and check settings without acting on them.
HANDLING = ("parse.py", "rules.py", "settings.py", "dataclasses.py", "<string>")
# Read on the way to an evaluation, without an effect on it.
READ_IN_PASSING = {
    "seed": "the data loader's generator; evaluation draws nothing",
    "reprob": "chooses where images are normalised, host or device",
    "bn_momentum": "set on the layers; running statistics stay as they are",
    "bn_init_bias": "set on the layers; the weights of the checkpoint replace it",
    "bf16_input_grad": "handed to the model; there are no gradients",
    "clip_grad": "kept with the precision; there are no gradients",
    "clip_mode": "kept with the precision; there are no gradients",
}


def record_reads(script: str, argv: list[str]) -> None:
    """Run a script, and write down the settings that were read."""
    import importlib

    from utils.config.settings import Config

    read = set()

    def watched(cfg, name):
        if name in SETTINGS and Path(sys._getframe(1).f_code.co_filename).name not in HANDLING:
            read.add(name)
        return object.__getattribute__(cfg, name)

    main = importlib.import_module(script).main
    Config.__getattribute__ = watched
    assert main(argv) == 0
    Path(f"{script}.json").write_text(json.dumps(sorted(read)))


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    """Program -> the names of the settings it read in a run with most of its parts in it."""
    folder = tmp_path_factory.mktemp("reads")
    (folder / "tiny.yml").write_text(TINY)
    train = ["-c", "tiny.yml", "--experiment", "run", "--mixup", "0.5", "--model-ema", "--recovery-interval", "2"]
    measure = ["-c", "tiny.yml", "--resume", "output/train/run/last.pth.tar", "--verify", "--sweep-T", "1",
               "--attention-map", "1", "--energy-extras", "memory"]  # fmt: skip
    for script, argv in (("train", train), ("firing_num", measure)):
        child = processes.start(record_reads, script, argv, cwd=folder)
        assert processes.finish(child) == [0], (folder / "output.txt").read_text()
    return {f"{script}.py": set(json.loads((folder / f"{script}.json").read_text())) for script in
            ("train", "firing_num")}  # fmt: skip


def test_settings_of_the_measurement_may_change_before_a_run_goes_on():
    then = config_from({}).as_dict() | {"sweep_T": [1], "use_ema": True, "lr": 0.5}
    assert _differences(then, config_from({})) == ["lr was 0.5 and is 0.01"]


def test_an_older_word_of_a_checkpoint_is_no_difference():
    then = config_from({}).as_dict() | {"engine": "event", "amp_dtype": "half"}  # the second is no valid one any more
    assert _differences(then, config_from({"engine": "sparse"})) == ["amp_dtype was 'half' and is 'auto'"]


def of(program):
    return {name for name, setting in SETTINGS.items() if setting.rules.only == program}


def test_training_reads_no_setting_of_the_measurement(reads):
    assert {"lr", "mixup", "model_ema_decay", "grad_accum_steps"} <= reads[TRAIN]
    assert not reads[TRAIN] & of(MEASURE)


def test_measuring_reads_no_setting_of_the_training(reads):
    assert {"energy_mode", "sweep_T", "verify_samples", "memory_pj", "use_ema"} <= reads[MEASURE]
    assert reads[MEASURE] & of(TRAIN) == set(READ_IN_PASSING)
