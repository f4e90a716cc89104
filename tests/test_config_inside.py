"""A checkpoint brings the settings of its training: what is taken from them, and what wins over them."""

from __future__ import annotations

import pytest

from utils.config.parse import parse_config
from utils.config.settings import Config
from utils.errors import UserError

TRAINED = Config(
    model="sdt",
    layer=3,
    dim=64,
    spike_mode="plif",
    dataset="digits",
    val_batch_size=120,
    workers=0,
    device="cpu",
    data_dir="/theirs",
    output="/theirs/runs",
    neuron_backend="cpp",
).as_dict()


def measure(*argv, trained=TRAINED):
    return parse_config(
        ["--resume", "a.pth.tar", *argv], prog="firing_num.py", description="", inside=lambda path: trained
    )


def test_what_was_trained_is_taken():
    cfg = measure()
    assert (cfg.layer, cfg.dim, cfg.spike_mode, cfg.dataset, cfg.val_batch_size) == (3, 64, "plif", "digits", 120)
    assert cfg.inside == "a.pth.tar"
    assert cfg.warnings == ()


def test_paths_device_workers_and_ways_to_compute_are_not():
    cfg, default = measure(), Config()
    for name in ("data_dir", "output", "device", "workers", "neuron_backend"):
        assert getattr(cfg, name) == getattr(default, name)


def test_a_setting_as_by_default_does_not_count_as_given():
    assert "mlp_ratio" not in measure().explicit
    assert "layer" in measure().explicit


def test_the_command_line_wins():
    cfg = measure("--layer", "5", "--workers", "1")
    assert (cfg.layer, cfg.dim, cfg.workers) == (5, 64, 1)


def test_a_file_replaces_them_as_a_whole(tmp_path):
    (tmp_path / "c.yml").write_text("layer: 2\n")
    cfg = measure("-c", str(tmp_path / "c.yml"))
    assert (cfg.layer, cfg.dim, cfg.dataset, cfg.inside) == (2, 256, "torch/cifar10", "")


def test_a_checkpoint_without_settings_leaves_the_defaults():
    cfg = measure(trained=None)
    assert (cfg.layer, cfg.inside) == (4, "")


def test_a_plugin_is_named_and_not_imported():
    cfg = measure(trained=TRAINED | {"plugin": ["mine.py"]})
    assert cfg.plugin is None
    assert len(cfg.warnings) == 1
    assert "mine.py" in cfg.warnings[0]
    assert "--plugin" in cfg.warnings[0]


def test_settings_of_another_version_are_named():
    assert "no_longer" in measure(trained=TRAINED | {"no_longer": 1}).warnings[0]


def test_a_wrong_value_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"config in a\.pth\.tar: layer: 'many'"):
        measure(trained=TRAINED | {"layer": "many"})


def test_a_wrong_option_is_answered_before_the_checkpoint_is_read():
    def inside(path):
        raise AssertionError("read")

    with pytest.raises(UserError, match="--laier"):
        parse_config(["--resume", "a", "--laier", "3"], prog="firing_num.py", description="", inside=inside)
