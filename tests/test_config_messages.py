"""What a wrong file or command line is answered with, and how a script ends."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from config_calls import fails, parse, refused

from utils.config.parse import config_from, load_yaml, parse_config
from utils.config.settings import MEASURE, SETTINGS, TRAIN, Config
from utils.errors import UserError, nearest, run_script

PROGRAMS = (TRAIN, MEASURE)
ROOT = Path(__file__).resolve().parent.parent


def test_three_mistakes_come_in_one_message(written):
    path = written("lr: fast\nepohs: 3\n")
    lines = fails("-c", path, "--neuron-backend", "tritn", "--dim", "100").splitlines()
    assert lines[0] == "5 problems in the settings:"
    assert f"{path}:1: lr: 'fast' is not valid" in lines[1]
    assert f"{path}:2: epohs: unknown setting; did you mean epochs?" in lines[2]
    assert "--neuron-backend: 'tritn'" in lines[3]
    assert "--dim" in lines[4]
    assert "--dim" in lines[5] or "num_heads" in lines[5]


def test_a_value_that_cannot_be_read_causes_no_second_complaint():
    assert "problems" not in refused(in_channels="two", mean=[0.1, 0.2])


def test_a_combination_names_the_line_it_comes_from(written):
    path = written("mixup: 0.5\nbatch_size: 33\n")
    assert fails("-c", path).startswith(f"{path}:2: batch_size")


def test_both_spellings_with_different_values_are_an_error(written):
    message = fails("-c", written("bce-loss: true\nbce_loss: false\n"))
    assert "a.yml:2: bce_loss: false contradicts bce-loss: true" in message
    assert load_yaml(written("bce-loss: true\nbce_loss: true\n")).bce_loss


def test_a_duplicated_key_is_an_error(written):
    assert "a.yml:3: seed: written twice" in fails("-c", written("seed: 1\nlr: 1\nseed: 1\n"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),  # no abbreviations
        (["--Lr", "3"], "did you mean --lr?"),
        (["--tet"], "did you mean --TET?"),
        (["-lr", "3"], "-lr: unknown option; did you mean --lr?"),
        # Not the short options -b and -c with a value:
        (["-batch-size", "3"], "-batch-size: unknown option; did you mean --batch-size?"),
        (["-batch_size=3"], "-batch_size: unknown option; did you mean --batch-size?"),
        (["-conf", "a.yml"], "-conf: unknown option; did you mean --config?"),
        (["-b-3"], "-b: '-3' is not valid"),
        (["stray"], "'stray' belongs to no option"),
        (["--amp", "true"], "write --amp or --no-amp"),
        (["--amp=true"], "write --amp or --no-amp"),
        (["--lr"], "--lr: needs a value: give a number >= 0"),
        (["--lr", "--amp"], "--lr: needs a value"),
        (["--lr", "-1"], "--lr: '-1' is not valid"),
        (["--lr", "-1e-3"], "--lr: '-1e-3' is not valid"),
        (["--mean", ".1", "x"], "each a number"),
    ],
)
def test_a_bad_command_line_is_one_clear_line(argv, expected):
    message = fails(*argv)
    assert expected in message
    assert "\n" not in message


def test_an_unknown_switch_in_yaml_names_the_setting():
    assert "write amp: false" in refused(no_amp=True)
    assert "the setting is no_aug" in refused(aug=False)


def test_a_yaml_cannot_name_another_one():
    assert "give it with -c" in refused(config="x.yml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "a.yml:2:2: cannot be read"),
        ("lr: !!python/name:os.system ''\n", "a.yml:1:5: cannot be read"),
        ("lr: \x01\n", "a.yml: cannot be read"),
        ("- lr\n", "a.yml: holds a list"),
        ("lr\n", "a.yml: holds a single value"),
        ("lr: 1\n---\nlr: 2\n", "cannot be read"),
        ("[a, b]: 1\n", "a.yml:1: (list or mapping): unknown setting"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(text, expected, written):
    message = fails("-c", written(text))
    assert expected in message
    assert "\n" not in message


def test_a_value_that_contains_itself_is_an_error(written):
    assert "a.yml:1:7: cannot be read" in fails("-c", written("mean: &a [*a]\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: !!int abc\n", "a.yml:1:9: cannot be read: 'abc' is no int value"),
        ("lr: !!float\n", "a.yml:1:5: cannot be read: '' is no float value"),
        ("amp: !!bool 1\n", "a.yml:1:6: cannot be read: '1' is no bool value"),
        ("seed: !!timestamp 2020-01-01\n", "a.yml:1:7: cannot be read: timestamp is no kind of value"),
        ("mean: !!set {a}\n", "a.yml:1:7: cannot be read: set is no kind of value"),
        ("lr: 1\nepochs: " + "9" * 5000, "a.yml:2:9: cannot be read: a number of 5000 digits"),
        ("mean: " + "[" * 50_000, "a.yml:1:27: cannot be read: more than 20 levels"),
        ("mean: " + "{a: " * 5000, "more than 20 levels"),
        ("mean:\n" + "- " * 5000 + "1\n", "more than 20 levels"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nmean: [" + "*b, " * 5000 + "]", "a.yml:3:7: cannot be read: more than 10000"),
        ("".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9 if i else 1}]\n" for i in range(30)), "more than 10000 values"),
        ("neuron_args: {tau: 1, tau: 2}\n", "a.yml:1:23: cannot be read: 'tau' is there twice"),
        ("neuron_args: {[1]: 1}\n", "a.yml:1:15: cannot be read: a list or mapping as a name"),
        ('data_dir: "\\U00110000"\n', "a.yml: cannot be read"),
        ("# " + "a" * 1_000_001, "a.yml: more than 1,000,000 characters"),
    ],
)
def test_a_value_that_no_setting_has_is_one_short_line(text, expected, written):
    message = fails("-c", written(text))
    assert expected in message
    assert "\n" not in message
    assert len(message) < 250


def test_an_alias_is_written_out(written):
    assert load_yaml(written("mean: &m [0.5, 0.5, 0.5]\nstd: *m\n")).std == [0.5] * 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-c", "missing.yml", "-c", "{file}"], "-c: names 2 files (missing.yml, "),
        (["-c", "{file}", "--config={file}"], "--config: names 2 files"),
        (["-c", ""], "-c: names no file; give one file"),
        (["--config="], "--config: names no file"),
    ],
)
def test_one_file_of_settings_and_no_other(argv, expected, written):
    message = fails(*(word.format(file=written("epochs: 7\n")) for word in argv))
    assert expected in message
    assert "\n" not in message


def test_an_empty_file_means_the_defaults(written):
    assert load_yaml(written("# nothing yet\n")) == Config()


def test_a_missing_file_names_the_nearest_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    message = fails("-c", "conf/cifar10/2_512.yml")
    assert message == "conf/cifar10/2_512.yml: no such file; did you mean conf/cifar10/2_512_300E_t4.yml?"
    assert "configurations are in conf/" in fails("-c", "nothing")
    assert len(fails("-c", "nothing", "--lr", "x").splitlines()) == 3
    assert "problems" not in fails("-c", "nothing", "--epochs", "2")  # the file may set warmup_epochs


def test_a_folder_or_a_binary_file_is_one_line(tmp_path):
    assert "cannot be read" in fails("-c", str(tmp_path))
    (tmp_path / "b.yml").write_bytes(b"\xff\xfe")
    assert "not a text file" in fails("-c", str(tmp_path / "b.yml"))


def test_help_needs_no_torch():
    code = (
        "import sys; from utils.config.parse import parse_config\n"
        "try: parse_config(['--help'], prog='train.py', description='Train.')\n"
        "except SystemExit: print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("prog", PROGRAMS)
def test_help_fits_100_columns_and_names_the_options_of_its_program_alone(capsys, prog):
    with pytest.raises(SystemExit) as caught:
        parse("--help", "--lr", "x", prog=prog)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    named = set(re.findall(r"(?<![\w-])-[\w-]+", re.sub(r"(?m)^ {5,}.*|  [^-].*$", "", text)))
    for setting in SETTINGS.values():
        options = {*setting.flags, *setting.rules.aliases}
        assert options & named == (options if setting.serves(prog) else set()), setting.name
        assert f"\n{setting.rules.group}:\n" in text or not setting.serves(prog)


@pytest.mark.parametrize("setting", [s for s in SETTINGS.values() if s.rules.only], ids=lambda s: s.name)
def test_an_option_of_the_other_program_alone_is_refused_and_its_yaml_key_is_not(setting, written):
    (other,) = set(PROGRAMS) - {setting.rules.only}
    value = [] if setting.kind is bool else ["1"] * (setting.rules.lengths or (1,))[0]
    for option in (*setting.flags, *setting.rules.aliases):
        # One line, whether or not the value is a valid one.
        assert fails(option, *value, prog=other) == (
            f"{option}: only {setting.rules.only} makes use of it, {other} does not; leave it out here (a YAML file "
            "for both may hold it)"
        )
    values = config_from({}).as_dict()
    assert parse("-c", written(f"{setting.name}: {json.dumps(values[setting.name])}\n"), prog=other).warnings == ()


def test_a_file_for_both_programs_troubles_neither_with_the_rules_of_the_other(written):
    for_training = written("epochs: 2\nwarmup_epochs: 5\nmixup: 0.5\nbatch_size: 33\nhflip: 0\nevent_roll: 3\n")
    assert "warmup_epochs 5 leaves nothing" in fails("-c", for_training)
    assert parse("-c", for_training, prog="firing_num.py").warnings == ()
    for_measuring = written("from_rates: a.json\nsweep_T: [2, 2]\n")
    assert parse("-c", for_measuring, "--resume", "a.pth.tar").sweep_T == [2, 2]
    message = fails("-c", for_measuring, "--resume", "a.pth.tar", prog="firing_num.py")
    assert "exclude each other" in message
    assert "2 more than once" in message


def test_a_value_of_the_wrong_type_is_told_by_both_programs(written):
    for prog in PROGRAMS:
        assert "verify: 3 is not valid" in fails("-c", written("verify: 3\n"), prog=prog)
        assert "lr: 'x' is not valid" in fails("-c", written("lr: x\n"), prog=prog)


def test_a_hint_names_options_of_the_program_alone():
    assert "did you mean --sweep-T?" in fails("--swep-T", "2", prog="firing_num.py")
    assert "did you mean" not in fails("--swep-T", "2")


def test_an_option_that_means_another_setting_is_shown_there(capsys):
    means = {"batch_size": "val_batch_size"}
    cfg = parse_config(["-b", "7"], prog="firing_num.py", description="", option_means=means)
    assert (cfg.val_batch_size, cfg.batch_size) == (7, Config().batch_size)
    with pytest.raises(SystemExit):
        parse_config(["--help"], prog="firing_num.py", description="", option_means=means)
    assert "  -vb, --val-batch-size, -b, --batch-size N\n" in capsys.readouterr().out


def raiser(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (lambda argv: 0, 0, ""),
        (lambda argv: 3, 3, ""),
        (raiser(UserError("bad lr")), 2, "train.py: error: bad lr\n"),
        (raiser(KeyboardInterrupt()), 130, "train.py: interrupted\n"),
    ],
)
def test_scripts_end_on_one_line_and_their_status(main, status, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_disk_that_refuses_is_one_line_and_status_2(number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(raiser(OSError(number, os.strerror(number), "output/x")))
    assert caught.value.code == 2
    line = f"train.py: error: {os.strerror(number)} (output/x); check the name, the free space and the rights there\n"
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(raiser(ZeroDivisionError()))


def test_nearest_looks_past_case_and_hyphens():
    assert nearest("tet-LAMB", SETTINGS) == "TET_lamb"
    assert nearest("zzzz", SETTINGS) is None
