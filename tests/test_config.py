"""Settings from YAML and command line: names, types, precedence and the round trip."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_calls import fails, parse, refused

from utils.config.command_line import help_text
from utils.config.parse import config_from, load_yaml, to_yaml
from utils.config.settings import SETTINGS, Config

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_DEFAULTS = json.loads((ROOT / "tests" / "golden" / "cli_defaults.json").read_text())


# Only speed depends on them: the run decides by its device.
DECIDED_BY_DEVICE = ("channels_last", "pin_mem")


@pytest.mark.parametrize(("name", "default"), PUBLISHED_DEFAULTS.items())
def test_every_published_option_name_is_accepted(name, default):
    own = None if name in DECIDED_BY_DEVICE else default
    assert getattr(Config(), name) == own
    option = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        undo = "--" + option[5:] if name.startswith("no_") else "--no-" + option[2:]
        cfg = parse(undo)
    else:
        values = default if isinstance(default, list) else ["none" if default is None else default]
        cfg = parse(option, *map(str, values))
    assert getattr(cfg, name) == default
    assert dataclasses.replace(cfg, **{name: own}) == Config()
    assert cfg.explicit == {name}


def test_every_setting_has_help_and_a_valid_default():
    for setting in SETTINGS.values():
        assert setting.rules.help, setting.name
        assert setting.read(setting.default) == setting.default, setting.name


def test_command_line_wins_over_yaml_wins_over_default(written):
    path = written("lr: 0.1\nepochs: 30\n")
    cfg = parse("-c", path, "--epochs", "40")
    assert (cfg.lr, cfg.epochs, cfg.batch_size) == (0.1, 40, 32)
    assert cfg.explicit == {"config", "lr", "epochs"}
    assert cfg.config == path


def test_a_hyphen_equals_an_underscore_everywhere(written):
    assert parse("--weight_decay", "0.5") == parse("--weight-decay=0.5") == config_from({"weight-decay": 0.5})
    assert parse("-c", written("weight-decay: 0.5\n")) == config_from({"weight_decay": 0.5})


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["-b", "8"], "batch_size", 8),
        (["-b8"], "batch_size", 8),
        (["-b=8"], "batch_size", 8),
        (["-vb", "8"], "val_batch_size", 8),
        (["-j", "0"], "workers", 0),
        (["-data-dir", "x"], "data_dir", "x"),
        (["-data_dir", "x"], "data_dir", "x"),
        (["--data-dir=x"], "data_dir", "x"),
        (["--local_rank=3"], "local_rank", 3),
        (["--local-rank", "3"], "local_rank", 3),
        (["--mean", ".1", ".2", ".3"], "mean", [0.1, 0.2, 0.3]),
        (["-data-dir=x"], "data_dir", "x"),
        (["--TET-means", "-1e-1"], "TET_means", -0.1),
        (["--TET-means", "-.5"], "TET_means", -0.5),
        (["--TET-means=-.5"], "TET_means", -0.5),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--img-size", "64", "--img-size", "none"], "img_size", None),
        (["--dist-bn", ""], "dist_bn", ""),
    ],
)
def test_command_line_spellings(argv, name, value):
    assert getattr(parse(*argv), name) == value


def test_the_published_command_lines_are_accepted():
    conf = ["-c", str(ROOT / "conf/imagenet/8_768_300E_t4.yml"), "--model", "sdt", "--spike-mode", "lif"]
    measure = ["--resume", "a.pth.tar", "--no-resume-opt", "--large-valid"]
    for launcher in (["--local-rank=1"], ["--local_rank=1"]):
        cfg = parse(*launcher, *conf, *measure)
        assert (cfg.local_rank, cfg.dim, cfg.no_resume_opt, cfg.large_valid) == (1, 768, True, True)
        assert cfg.warnings == ()


@pytest.mark.parametrize("name", ["no_aug", "no_prefetcher", "no_resume_opt"])
def test_negative_flags_can_be_undone(name, written):
    flag = name.removeprefix("no_").replace("_", "-")
    assert getattr(parse(f"--no-{flag}"), name)
    assert not getattr(parse("-c", written(f"{name}: true\n"), f"--{flag}"), name)


def test_every_yaml_true_can_be_undone(written):
    for name, setting in SETTINGS.items():
        if setting.kind is bool:
            path, prog = written(f"{name}: true\n"), setting.rules.only or "train.py"
            assert getattr(parse("-c", path, setting.flags[1], prog=prog), name) is False, name


def test_no_two_settings_share_an_option():
    options = [option for setting in SETTINGS.values() for option in (*setting.flags, *setting.rules.aliases)]
    assert len(options) == len(set(options))


def test_event_mode_follows_the_data_set_unless_given():
    assert config_from({"dataset": "cifar10-dvs"}).event_mode
    assert config_from({"dataset": "cifar10-dvs-tet"}).event_mode
    assert not config_from({"dataset": "gesture"}).event_mode
    assert parse("--dataset", "gesture", "--dvs-mode").event_mode


def test_yaml_3e_4_is_a_float(written):
    assert parse("-c", written("lr: 3e-4\n")).lr == 3e-4
    assert config_from({"lr": "3e-4"}).lr == 3e-4


@pytest.mark.parametrize("text", ["0011", '"0011"'])
def test_pooling_stat_keeps_its_zeros(text, written):
    assert load_yaml(written(f"pooling_stat: {text}\n")).pooling_stat == "0011"


@pytest.mark.parametrize("value", ["1", "0", "yes", "off", '"true"', "null"])
def test_a_switch_is_true_or_false_only(value, written):
    assert "give true or false" in fails("-c", written(f"amp: {value}\n"))


@pytest.mark.parametrize("value", [0.5, 1.5, 20.5, "4", True, None, [4]])
def test_a_whole_number_is_not_anything_else(value):
    assert "give a whole number >= 1" in refused(epochs=value)


def test_a_whole_float_is_a_whole_number():
    epochs = config_from({"epochs": 20.0}).epochs
    assert epochs == 20
    assert isinstance(epochs, int)


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), "fast", "1_0", " 1", "\u0661", True, None, 10**400])
def test_a_number_is_finite_and_written_in_digits(value):
    assert "lr" in refused(lr=value)


def test_a_number_that_python_does_not_write_is_one_short_line():
    assert "lr: a number of thousands of digits is not valid" in refused(lr=10**5000)


@pytest.mark.parametrize("word", ["1.5", "1_0", " 1", "\u0661", "1e2", "9" * 5000])
def test_a_whole_number_on_a_command_line_is_written_in_digits(word):
    message = fails("--epochs", word)
    assert "give a whole number >= 1 and <= 100000" in message
    assert len(message) < 250


NUMBERS = [s for s in SETTINGS.values() if s.kind in (int, float)]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
def test_every_number_has_an_upper_bound_and_the_help_tells_it(setting):
    value = 2**63 if setting.name == "seed" else 10**15
    with pytest.raises(ValueError, match="not valid") as caught:
        setting.read([value] * (setting.rules.lengths or (1,))[0] if setting.is_list else value)
    assert setting.range in str(caught.value)
    text = " ".join(help_text(setting.rules.only or "train.py", "", {}).split())
    assert f"({setting.range}" in text[text.index(setting.flags[0] + " ") :].partition(" --")[0]


@pytest.mark.parametrize("name", [".", "..", "a/..", "../a", "./a", "a/./b", "/tmp/a", "a//b", "a/"])
def test_an_experiment_stays_in_the_output_folder(name):
    assert 'without "." and ".."' in refused(experiment=name)


@pytest.mark.parametrize("name", ["", "a", "a/b", "..a", "a..", ".a/b.c", "日本 é"])
def test_an_experiment_has_any_other_name(name):
    assert config_from({"experiment": name}).experiment == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("\ud800", "not all of its characters exist in utf-8"),
        ("a" * 256, "so long a name"),
        ("a/" * 3000, "so long a name"),
    ],
)
@pytest.mark.parametrize("name", ["output", "experiment", "data_dir", "plugin", "resume", "model", "gp"])
def test_text_is_what_a_file_may_be_called(name, text, expected):
    message = refused(**{name: [text] if SETTINGS[name].is_list else text})
    assert name in message
    assert expected in message or SETTINGS[name].rules.pattern
    assert len(message) < 400


def test_under_an_ascii_locale_the_message_says_what_to_set(tmp_path):
    (tmp_path / "a.yml").write_text("experiment: é\n", encoding="utf-8")
    code = "from utils.config.parse import load_yaml; load_yaml({!r})".format(str(tmp_path / "a.yml"))
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | ascii_alone,
        check=False,
    )
    assert "not all of its characters exist in ascii" in done.stderr.splitlines()[-1]
    assert "LC_ALL=C.UTF-8" in done.stderr.splitlines()[-1]


def test_null_only_where_the_type_says_so():
    assert config_from({"clip_grad": None}).clip_grad is None
    assert "not valid" in refused(opt=None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"neuron_backend": "tritn"}, "did you mean triton?"),
        ({"sched": "multistep"}, "one of cosine, tanh, step, plateau, poly"),
        ({"clip_mode": "x"}, "one of norm, value, agc"),
        ({"eval_metric": "x"}, "one of loss, top1, top5"),
        ({"dist_bn": "x"}, 'one of "", broadcast, reduce'),
        ({"mixup_mode": "x"}, "one of batch, pair, elem"),
        ({"device": "cuda:x"}, "auto, cpu, cuda or cuda:N"),
        ({"TET_lamb": 1.5}, "a number >= 0 and <= 1"),
        ({"smoothing": 1}, "a number >= 0 and < 1"),
        ({"pooling_stat": "111"}, "four characters, each 0 or 1"),
        ({"experiment": 1.5}, "put it in quotes"),
        ({"scale": [0.1]}, "a list of two values"),
        ({"scale": [0.1, 0.5, 1]}, "a list of two values"),
        ({"scale": 0.5}, "a list of two values"),
        ({"cutmix_minmax": [0.1]}, "a list of two values"),
        ({"mean": []}, "a list of values"),
        ({"input_size": [3, 32]}, "a list of three values"),
    ],
)
def test_a_bad_value_names_the_valid_ones(values, expected):
    message = refused(**values)
    assert expected in message
    assert next(iter(values)) in message


def test_round_trip(tmp_path):
    values = {"lr": 1e-6, "mean": [0.1, 0.2, 0.3], "pooling_stat": "0011", "apex_amp": True, "lr_noise": [1]}
    cfg = config_from(values | {"experiment": '1e5 "quoted" null é', "output": "no", "data_dir": "1e5", "drop": 0.1})
    path = tmp_path / "args.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8")
    again = load_yaml(path)
    assert again == cfg
    assert again.config == str(path)
    assert len(again.warnings) == len(cfg.warnings) == 2


def test_round_trip_of_a_mapping():
    assert config_from(Config().as_dict()) == Config()
    assert config_from(Config().as_dict()).warnings == ()


@pytest.mark.parametrize(
    "argv",
    [
        ["--neuron-args", "tau=3.0", "name=0011", "deep=[1, {a: null}]"],
        ["--neuron-args", "{tau: 3.0, name: 0011, deep: [1, {a: null}]}"],
    ],
)
def test_arguments_of_a_neuron_are_a_mapping(argv, tmp_path):
    expected = {"tau": 3.0, "name": "0011", "deep": [1, {"a": None}]}
    cfg = parse(*argv)
    assert cfg.neuron_args == config_from({"neuron_args": expected}).neuron_args == expected
    (tmp_path / "a.yml").write_text(to_yaml(cfg))
    assert load_yaml(tmp_path / "a.yml") == cfg


@pytest.mark.parametrize("value", [3, "tau", {1: 2}, {"tau": float("nan")}, {"tau": {1, 2}}, [1]])
def test_what_is_no_mapping_is_refused(value):
    assert "give names with values, as {tau: 3.0}" in refused(neuron_args=value)


@pytest.mark.parametrize("word", ["tau", "=3", "{tau: [}", "tau=[", "{tau"])
def test_a_word_that_is_no_mapping_is_refused(word):
    assert "give names with values, as {tau: 3.0}" in fails("--neuron-args", word)


def test_plugins_are_one_value_a_list_or_one_option_each(written):
    path = written("plugin: a.py\n")
    assert load_yaml(path).plugin == ["a.py"]
    assert config_from({"plugin": ["a.py", "b.py"]}).plugin == ["a.py", "b.py"]
    # As for every setting, the command line replaces what the file says.
    cfg = parse("-c", path, "--plugin", "b.py", "--epochs", "7", "--plugin", "c.py", "d.py")
    assert cfg.plugin == ["b.py", "c.py", "d.py"]
    assert load_yaml(written(to_yaml(cfg))).plugin == cfg.plugin


def test_the_older_name_of_an_engine_is_stored_as_the_present_one():
    assert config_from({"engine": "event"}).engine == parse("--engine", "event").engine == "sparse"
    assert "one of auto, dense, sparse" in refused(engine="events")
