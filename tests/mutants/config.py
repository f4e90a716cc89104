"""Faults in the settings: types, spellings, rules, messages."""

from __future__ import annotations

from .mutant import faults

_FIELD, _LINE, _PARSE = "utils/config/field.py", "utils/config/command_line.py", "utils/config/parse.py"
_RULES, _SETTINGS, _YAML = "utils/config/rules.py", "utils/config/settings.py", "utils/config/yaml_file.py"

MUTANTS = faults(
    "config",
    (
        _FIELD,
        "if isinstance(value, float) and value.is_integer():",
        "if isinstance(value, float):",
        "epochs: 1.5 is taken as 1",
        "test_config.py::test_a_whole_number_is_not_anything_else",
    ),
    (
        _FIELD,
        "if isinstance(value, bool) or not isinstance(value, int):",
        "if not isinstance(value, int):",
        "epochs: true is 1",
        "test_config.py::test_a_whole_number_is_not_anything_else",
    ),
    (
        _FIELD,
        '"low": (">=", ge)',
        '"low": (">=", gt)',
        "an included bound is refused: reprob 0",
        "test_config.py::test_every_setting_has_help_and_a_valid_default",
    ),
    (
        _FIELD,
        '"below": ("<", lt)',
        '"below": ("<", le)',
        "an excluded bound is allowed: smoothing 1",
        "test_config.py::test_a_bad_value_names_the_valid_ones",
    ),
    (
        _LINE,
        '("-data-dir", "-data_dir")',
        '("-data-dir",)',
        "-data_dir of the published command line is refused",
        "test_config.py::test_command_line_spellings",
    ),
    (
        _LINE,
        r'r"-(\.?\d.*|inf|nan)"',
        r'r"-(\d.*|inf|nan)"',
        "-.5 is refused as a value",
        "test_config.py::test_command_line_spellings",
    ),
    (
        _LINE,
        "written == setting.flags[0]",
        "True",
        "--no-amp switches amp on",
        "test_config.py::test_every_yaml_true_can_be_undone",
    ),
    (
        _PARSE,
        'name, place = entry.key.replace("-", "_")',
        "name, place = entry.key",
        "hyphens in YAML keys are unknown settings",
        "test_config.py::test_a_hyphen_equals_an_underscore_everywhere",
    ),
    (
        _PARSE,
        "elif earlier is not entry and earlier.value != entry.value:",
        "elif False:",
        "two spellings of one key with different values: the last one wins silently",
        "test_config_messages.py::test_both_spellings_with_different_values_are_an_error",
    ),
    (
        _PARSE,
        "found = (f for f in impossible(cfg) if not self.unreadable.intersection(f.names))",
        "found = impossible(cfg)",
        "a rule complains about the default of a value that could not be read",
        "test_config_messages.py::test_a_value_that_cannot_be_read_causes_no_second_complaint",
    ),
    (
        _PARSE,
        "style = '\"' if isinstance(value, str) else None",
        "style = None",
        "a folder called 1e5 comes back from args.yaml as a number",
        "test_config.py::test_round_trip",
    ),
    (
        _RULES,
        "    if cfg.warmup_epochs >= cfg.epochs:",
        "    if cfg.warmup_epochs > cfg.epochs:",
        "a warm-up as long as the run is allowed",
        "test_config_rules.py",
    ),
    (
        _RULES,
        "if values != sorted(values):",
        "if values == sorted(values, reverse=True) and len(set(values)) > 2:",
        "a range that descends is allowed",
        "test_config_rules.py",
    ),
    (
        _SETTINGS,
        "return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None",
        "return self.mixup > 0 or self.cutmix > 0",
        "cutmix_minmax alone mixes nothing",
        "test_loaders.py::test_mixup_is_built_where_the_settings_ask_for_it",
    ),
    (
        _SETTINGS,
        'EVENT_MODE_DATASETS = ("cifar10-dvs", "cifar10-dvs-tet")',
        'EVENT_MODE_DATASETS = ("cifar10-dvs", "cifar10-dvs-tet", "gesture")',
        "gesture gets the event mode, which its published model is without",
        "test_config.py::test_event_mode_follows_the_data_set_unless_given",
    ),
    (
        _SETTINGS,
        'opt: str = _optim("sgd"',
        'opt: str = _optim("adamw"',
        "a published default is another one",
        "test_config.py::test_every_published_option_name_is_accepted",
    ),
    (
        _YAML,
        'r"[-+]?(0|[1-9][0-9]*)", int)',
        'r"[-+]?[0-9]+", int)',
        "0011 is read as a number",
        "test_config.py::test_pooling_stat_keeps_its_zeros",
    ),
    (
        _YAML,
        "key.start_mark.line + 1",
        "key.start_mark.line",
        "messages name the line above",
        "test_config_messages.py::test_a_combination_names_the_line_it_comes_from",
    ),
    (
        "utils/errors.py",
        "sys.exit(status)",
        "sys.exit(0)",
        "a refused start ends with status 0",
        "test_config_messages.py::test_scripts_end_on_one_line_and_their_status",
    ),
)
