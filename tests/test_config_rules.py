"""Combinations of settings that cannot work, and settings that do nothing."""

import pytest
from config_calls import parse, refused

from utils.config.parse import config_from
from utils.config.settings import SETTINGS, Config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dim": 100, "num_heads": 4}, "96 and 104"),
        ({"dim": 256, "num_heads": 12}, "num_heads can be 1, 2, 4, 8, 16 or 32"),
        ({"img_size": 36}, "not divisible by 16, which pooling_stat 1111 needs; use 32 or 48"),
        ({"img_size": 6, "pooling_stat": "0111"}, "use 8, or fewer 1"),
        ({"input_size": [3, 32, 36]}, "input_size 36 is not divisible by 16"),
        ({"input_size": [2, 32, 32]}, "in_channels is 3"),
        ({"input_size": [3, 32, 32], "img_size": 64}, "give only one"),
        ({"mean": [0.1, 0.2]}, "one value per channel"),
        ({"std": [0.1, 0.2, 0.3], "in_channels": 2}, "one value per channel"),
        ({"scale": [1, 0.5]}, "write [0.5, 1]"),
        ({"ratio": [2, 1]}, "write [1, 2]"),
        ({"cutmix_minmax": [0.8, 0.2]}, "write [0.2, 0.8]"),
        ({"lr_noise": [0.9, 0.4]}, "write [0.4, 0.9]"),
        ({"aug_splits": 1}, "2 or more"),
        ({"jsd": True}, "jsd needs the copies of aug_splits"),
        ({"split_bn": True}, "split_bn needs the copies of aug_splits"),
        ({"resplit": True}, "resplit needs the copies of aug_splits"),
        ({"jsd": True, "aug_splits": 3, "mixup": 0.2}, "jsd and aug_splits 3 cannot be combined with mixup"),
        ({"aug_splits": 2, "cutmix": 1}, "cannot be combined with mixup or cutmix"),
        ({"bce_target_thresh": 0.2}, "needs bce_loss"),
        ({"mixup": 0.2, "batch_size": 33}, "batch_size 33 is odd"),
        ({"cutmix_minmax": [0.2, 0.8], "batch_size": 1}, "batch_size 1 is odd"),
        ({"resume": "a", "initial_checkpoint": "b"}, "exclude each other"),
        ({"resume": "a", "initial_partial": "b"}, "resume a and initial_partial b exclude each other"),
        ({"initial_checkpoint": "a", "initial_partial": "b"}, "initial_partial b exclude each other"),
        ({"sync_bn": True, "split_bn": True, "aug_splits": 2}, "exclude each other"),
        ({"epochs": 3}, "use warmup_epochs 2 or less"),
    ],
)
def test_an_impossible_combination_names_the_remedy(values, expected):
    message = refused(**values)
    assert expected in message
    assert "problems" not in message  # exactly one


@pytest.mark.parametrize(
    "values",
    [
        {"mean": [0.5], "std": [0.5]},
        {"batch_size": 33},
        {"pooling_stat": "0000", "img_size": 7},
        {"jsd": True, "aug_splits": 2, "resplit": True, "split_bn": True, "reprob": 0.1},
        {"bce_target_thresh": 0.2, "bce_loss": True},
        {"scale": [1, 1]},
        {"warmup_epochs": 0, "epochs": 1},
        # A plugin may bring another model, or a set of events.
        {"plugin": "a.py", "dim": 100, "num_heads": 3, "img_size": 9},
        {"plugin": "a.py", "dataset": "mine", "event_roll": 3},
    ],
)
def test_a_possible_combination_passes(values):
    assert config_from(values).warnings == ()


UNAVAILABLE = [name for name, setting in SETTINGS.items() if setting.rules.unavailable]


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_is_not_available_yet_is_an_error(name):
    value = {bool: True, int: 1, str: "x"}[SETTINGS[name].kind]
    assert "not available in this version" in refused(**{name: value})
    assert config_from({name: SETTINGS[name].default}) == Config()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"drop": 0.1}, "no effect"),
        ({"drop_path": 0.1}, "no effect"),
        ({"drop_block": 0.1}, "no effect"),
        ({"drop_connect": 0.1}, "no effect"),
        ({"gp": "avg"}, "no effect"),
        ({"patch_size": 4}, "no effect"),
        ({"use_conv_as_linear": True}, "no effect"),
        ({"bn_tf": True}, "never reached the model"),
        ({"engine": "auto", "device": "cuda"}, "its kernels run on a CPU"),
        ({"apex_amp": True}, "amp is switched on"),
        ({"native_amp": True}, "amp is switched on"),
    ],
)
def test_no_effect_settings_warn_once(values, expected):
    (warning,) = config_from(values).warnings
    assert expected in warning
    assert next(iter(values)) in warning


def test_no_effect_settings_at_their_default_do_not_warn():
    assert config_from({"drop_path": 0.2, "drop": 0, "recount": 1}).warnings == ()


def test_older_names_switch_amp_on_unless_amp_is_given_later(written):
    assert config_from({"apex_amp": True}).amp
    assert parse("-c", written("amp: false\n"), "--native-amp").amp
    cfg = parse("-c", written("apex_amp: true\n"), "--no-amp")
    assert not cfg.amp
    assert "amp: false was given and wins" in cfg.warnings[0]


@pytest.mark.parametrize(
    ("name", "value", "partner"),
    [
        ("TET_means", 0.5, {"TET": True, "TET_lamb": 0.1}),
        ("TET_lamb", 0.1, {"TET": True}),
        ("amp_dtype", "bfloat16", {"amp": True}),
        ("bf16_input_grad", True, {"engine": "auto"}),
        ("clip_mode", "value", {"clip_grad": 1.0}),
        ("remode", "pixel", {"reprob": 0.1}),
        ("recount", 2, {"reprob": 0.1}),
        ("mixup_prob", 0.5, {"mixup": 0.2}),
        ("mixup_switch_prob", 0.2, {"cutmix": 0.2}),
        ("mixup_mode", "elem", {"cutmix_minmax": [0.2, 0.8]}),
        ("mixup_off_epoch", 5, {"mixup": 0.2}),
        ("lr_base_size", 128, {"lr_base": 0.1}),
        ("lr_base_scale", "sqrt", {"lr_base": 0.1}),
        ("lr_noise_pct", 0.1, {"lr_noise": [0.5]}),
        ("lr_noise_std", 0.1, {"lr_noise": [0.5]}),
        ("lr_cycle_mul", 2.0, {"sched": "cosine"}),
        ("lr_cycle_limit", 2, {"sched": "poly"}),
        ("patience_epochs", 3, {"sched": "plateau"}),
        ("decay_epochs", 3.0, {"sched": "step"}),
        ("min_lr", 1e-6, {"sched": "tanh"}),
        ("cooldown_epochs", 1, {"sched": "cosine"}),
        ("warmup_lr", 1e-6, {"warmup_epochs": 2}),
        ("model_ema_decay", 0.9, {"model_ema": True}),
        ("model_ema_force_cpu", True, {"model_ema": True}),
        ("verify_samples", 3, {"verify": True}),
    ],
)
def test_a_setting_without_its_partner_warns(name, value, partner):
    alone = {"sched": "cosine", "warmup_epochs": 0} if name in ("decay_epochs", "warmup_lr") else {}
    (warning,) = config_from({name: value} | alone).warnings
    assert name in warning
    assert "has no effect: it needs" in warning
    assert all(key in warning for key in partner if key not in ("cutmix_minmax", "TET_lamb"))
    assert config_from({name: value} | partner).warnings == ()


@pytest.mark.parametrize(
    ("aa", "expected"),
    [
        ("rand-mx", "'mx' is no part of rand; valid: m9 (strength)"),
        ("rand-m9-pX", "'pX' is no part of rand"),
        ("rand-m9-m5", "'m5' is there twice"),
        ("rand-m9-", "'' is no part of rand"),
        ("rand-tnope", "'tnope' is no part of rand"),
        ("original-mstdx", "'mstdx' is no part of original; valid: mstd0.5"),
        ("original-m9", "'m9' is no part of original"),
        ("augmix-w0", "'w0' is no part of augmix"),
        ("rnad-m9", "'rnad' is no policy; did you mean rand?"),
    ],
)
def test_a_bad_part_of_a_policy_is_named(aa, expected, written):
    message = refused(aa=aa)
    assert f"aa {aa} is not valid: {expected}" in message
    assert parse("-c", written(f"aa: {aa}\n"), prog="firing_num.py").aa == aa  # not its business


@pytest.mark.parametrize(
    "aa", [None, "", "rand-m9-n1-mstd0.4-inc1", "augmix-m5-w4-d2", "original", "v0r-mstd0.5", "3a"]
)
def test_a_policy_is_taken(aa):
    assert config_from({"aa": aa}).aa == aa
