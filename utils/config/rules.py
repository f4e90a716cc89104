"""Combinations of settings that cannot work (errors) or do nothing (warnings), each with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from utils.config.field import shown
from utils.config.policies import why_no_policy
from utils.config.settings import EVENT_DATASETS, SETTINGS, Config

EVENT_DATA = ("event_split", "split_hash", "event_wire", "tet_counts")
EVENT_AUGMENTATIONS = tuple(name for name, s in SETTINGS.items() if s.rules.group == "Event augmentation")
OLDER_NAMES_OF_AMP = ("apex_amp", "native_amp")
# What a checkpoint fixes: its model. How fast its neurons run is no part of that.
OF_A_CHECKPOINT = tuple(
    name
    for name, s in SETTINGS.items()
    if s.rules.group in ("Model", "Neuron") and name not in ("neuron_backend", "neuron_dtype")
)
_LEAST_ALPHA = 1e-3  # far below, the draws are NaN
_MIXING = ("mixup", "cutmix", "cutmix_minmax")
# Of each group, one at most may be given; a message names the place of the last one.
_EXCLUSIVE = {
    ("resume", "initial_checkpoint", "initial_partial"): "use resume to continue a run, initial_checkpoint to start a "
    "new one, initial_partial to start one from what fits",
    ("sync_bn", "split_bn"): "set one of them to false",
    ("resume", "from_rates", "compare"): "use resume to measure a checkpoint, from_rates for rates that were measured "
    "before, compare for several checkpoints",
}
_NOT_FOR_EVENTS = {
    "aug_splits": "leave it out",
    "reprob": "it would erase another place in each frame; use event_cutout",
    "train_split_path": "it lists images; use event_split",
}


class Finding(NamedTuple):
    """What is wrong about the settings `names`; the first one that was given names the place in a message."""

    names: tuple[str, ...]
    message: str


class _Beside(NamedTuple):
    """Settings that do something only beside another one."""

    names: tuple[str, ...]
    needed: str
    is_there: Callable[[Config], bool]


_SHAPED = ("cosine", "tanh", "poly")
_PARTNERS = (
    _Beside(("TET_means", "TET_lamb"), "TET: true", lambda cfg: cfg.TET),
    _Beside(("TET_means",), "TET_lamb above 0", lambda cfg: cfg.TET_lamb > 0),
    _Beside(("teacher", "teacher_checkpoint", "kd_alpha", "kd_tau"), "kd: hard or soft", lambda cfg: cfg.kd != "none"),
    _Beside(("amp_dtype",), "amp: true", lambda cfg: cfg.amp),
    _Beside(("bf16_input_grad",), "engine: auto or sparse", lambda cfg: cfg.engine != "dense"),
    _Beside(("clip_mode",), "clip_grad", lambda cfg: cfg.clip_grad is not None),
    _Beside(("remode", "recount", "resplit"), "reprob above 0", lambda cfg: cfg.reprob > 0),
    _Beside(("mixup_prob", "mixup_switch_prob", "mixup_mode"), "mixup or cutmix", lambda cfg: cfg.mixes),
    _Beside(("mixup_off_epoch",), "mixup, cutmix or event_mix", lambda cfg: cfg.mixes or cfg.event_mix > 0),
    _Beside(("lr_base_size", "lr_base_scale"), "lr_base", lambda cfg: cfg.lr_base is not None),
    _Beside(("lr_noise_pct", "lr_noise_std"), "lr_noise", lambda cfg: cfg.lr_noise is not None),
    _Beside(("lr_cycle_mul", "lr_cycle_limit"), "sched: cosine, tanh or poly", lambda cfg: cfg.sched in _SHAPED),
    _Beside(("patience_epochs",), "sched: plateau", lambda cfg: cfg.sched == "plateau"),
    _Beside(("decay_epochs",), "sched: step", lambda cfg: cfg.sched == "step"),
    _Beside(("min_lr",), "another sched than step", lambda cfg: cfg.sched != "step"),
    _Beside(("cooldown_epochs",), "sched: cosine, tanh or poly", lambda cfg: cfg.sched in _SHAPED),
    _Beside(("warmup_lr",), "warmup_epochs above 0", lambda cfg: cfg.warmup_epochs > 0),
    _Beside(("model_ema_decay", "model_ema_force_cpu"), "model_ema: true", lambda cfg: cfg.model_ema),
    _Beside(("verify_samples",), "verify: true", lambda cfg: cfg.verify),
)


def impossible(cfg: Config) -> Iterator[Finding]:
    """The combinations in `cfg` that cannot work."""
    for rules in (_unavailable, _exclusive, _model, _image, _mixing, _distillation, _training, _measurement):
        yield from rules(cfg)


def ignored(cfg: Config) -> Iterator[Finding]:
    """The settings in `cfg` that differ from their default without any effect."""
    for name, setting in SETTINGS.items():
        if setting.rules.no_effect and getattr(cfg, name) != setting.default:
            if name in OLDER_NAMES_OF_AMP:
                outcome = "amp is switched on" if cfg.amp else "amp: false was given and wins"
                yield Finding((name,), f"older name of amp: {setting.rules.no_effect}; {outcome}")
            else:
                yield _about(cfg, name, f"has no effect: {setting.rules.no_effect}")
    if cfg.dataset not in EVENT_DATASETS and not cfg.plugin:  # a plugin may bring event data
        for name in (*EVENT_DATA, *EVENT_AUGMENTATIONS):
            if getattr(cfg, name) != SETTINGS[name].default:
                yield _about(cfg, name, f"has no effect: dataset {cfg.dataset} holds images")
    if cfg.is_v2:
        for name in ("layer", "dim", "pooling_stat", "dvs_mode"):
            if getattr(cfg, name) != SETTINGS[name].default:
                yield _about(cfg, name, f"has no effect on {cfg.model}, a V2 model", "model")
    told = set()
    for names, needed, is_there in _PARTNERS:
        for name in names:
            if getattr(cfg, name) != SETTINGS[name].default and not is_there(cfg) and name not in told:
                told.add(name)
                yield _about(cfg, name, f"has no effect: it needs {needed}")
    if cfg.kd == "hard" and cfg.kd_tau != SETTINGS["kd_tau"].default:
        yield _about(cfg, "kd_tau", "is ignored with kd: hard", "kd")
    if cfg.lr_base is not None and "lr" in cfg.explicit:
        yield _about(cfg, "lr", f"is ignored: lr_base {cfg.lr_base:g} sets the learning rate")
    if cfg.engine != "dense" and cfg.device.startswith("cuda"):
        yield _about(cfg, "engine", f"is ignored on {cfg.device}; its kernels run on a CPU", "device")


def _about(cfg: Config, name: str, text: str, *others: str) -> Finding:
    """A finding that begins with the setting `name` and its value."""
    return Finding((name, *others), f"{_given(cfg, name)} {text}")


def _given(cfg: Config, name: str) -> str:
    """A setting and its value, for a message."""
    value = getattr(cfg, name)
    if isinstance(value, float):
        value = f"{value:g}"
    return f"{name} {value if isinstance(value, str) else shown(value)}"


def _unavailable(cfg: Config) -> Iterator[Finding]:
    for name, setting in SETTINGS.items():
        if setting.rules.unavailable and getattr(cfg, name) != setting.default:
            remedy = f"leave {name} at {shown(setting.default)}"
            yield _about(cfg, name, f"is not available in this version: {setting.rules.unavailable}; {remedy}")


def _exclusive(cfg: Config) -> Iterator[Finding]:
    for names, remedy in _EXCLUSIVE.items():
        given = [name for name in names if getattr(cfg, name)]
        if len(given) > 1:
            words = " and ".join(_given(cfg, name) for name in given)
            yield Finding(tuple(reversed(given)), f"{words} exclude each other; {remedy}")


def _model(cfg: Config) -> Iterator[Finding]:
    if cfg.plugin:
        return  # a plugin may bring another model; each model checks its sizes when it is built
    yield from _sizes_of_v2(cfg) if cfg.is_v2 else _sizes_of_v1(cfg)


def _sizes_of_v2(cfg: Config) -> Iterator[Finding]:
    for name, instead in (("dim", "embed_dims"), ("layer", "depths")):
        if getattr(cfg, name) != SETTINGS[name].default and getattr(cfg, instead) is None:
            count = (SETTINGS[instead].rules.lengths or (0,))[0]
            yield _about(cfg, name, f"does not fit {cfg.model}, a V2 model; use {instead} with {count} values", "model")
    wrong = [dim for dim in (cfg.embed_dims or [])[2:] if dim % cfg.num_heads]
    if wrong:
        text = f"does not divide {_words(wrong)} of embed_dims, the channels of its attention"
        yield _about(cfg, "num_heads", f"{text}; make them multiples of it", "embed_dims")
    if cfg.embed_dims and cfg.embed_dims[0] < 2:
        yield _about(cfg, "embed_dims", "starts with 1, and the first convolution has half of it; use 2 or more")


def _sizes_of_v1(cfg: Config) -> Iterator[Finding]:
    for name, instead in (("embed_dims", "dim"), ("depths", "layer")):
        if getattr(cfg, name) is not None:
            yield _about(cfg, name, f"is for V2, and model is {cfg.model}; use {instead}", "model")
    if cfg.dim % 8:
        nearest = f"{cfg.dim // 8 * 8} and {(cfg.dim // 8 + 1) * 8}"
        why = "patch splitting starts from dim / 8 channels"
        yield _about(cfg, "dim", f"is not divisible by 8 ({why}); the nearest valid ones are {nearest}")
    if cfg.dim % cfg.num_heads:
        fitting = _words(heads for heads in range(1, 33) if cfg.dim % heads == 0)
        yield _about(cfg, "num_heads", f"does not divide dim {cfg.dim}; num_heads can be {fitting}", "dim")
    factor = 2 ** cfg.pooling_stat.count("1")
    for name, sides in (("img_size", [cfg.img_size or 0]), ("input_size", (cfg.input_size or [])[1:])):
        for side in sorted({side for side in sides if side % factor}):
            # MaxPool2d(3, stride 2, padding 1) gives ceil(n / 2): an odd size no longer tiles the image.
            lower = side // factor * factor
            fitting = _words(size for size in (lower, lower + factor) if size)
            needs = f"which pooling_stat {cfg.pooling_stat} needs"
            remedy = f"use {fitting}, or fewer 1 in pooling_stat"
            yield Finding((name, "pooling_stat"), f"{name} {side} is not divisible by {factor}, {needs}; {remedy}")


def _image(cfg: Config) -> Iterator[Finding]:
    channels = cfg.in_channels
    if cfg.input_size and cfg.input_size[0] != channels:
        text = f"starts with {cfg.input_size[0]} channels, in_channels is {channels}; make them equal"
        yield _about(cfg, "input_size", text, "in_channels")
    if cfg.input_size and cfg.img_size and cfg.input_size[1:] != [cfg.img_size] * 2:
        yield _about(cfg, "input_size", f"and img_size {cfg.img_size} differ; give only one of them", "img_size")
    for name, values in (("mean", cfg.mean), ("std", cfg.std)):
        if values is not None and len(values) not in (1, channels):
            text = f"has {len(values)} values, in_channels is {channels}; give one value per channel, or one for all"
            yield _about(cfg, name, text, "in_channels")
    for name in ("scale", "ratio", "cutmix_minmax", "lr_noise"):
        values = getattr(cfg, name) or []
        if values != sorted(values):
            first, last = values
            yield _about(cfg, name, f"descends; write [{last:g}, {first:g}]")
    if reason := why_no_policy(cfg.aa or ""):
        yield _about(cfg, "aa", reason)


def _mixing(cfg: Config) -> Iterator[Finding]:
    if cfg.aug_splits == 1:
        yield _about(cfg, "aug_splits", "splits nothing; use 0 (off), or 2 or more")
    if cfg.aug_splits < 2:
        for name in ("jsd", "split_bn", "resplit"):
            if getattr(cfg, name):
                remedy = f"set aug_splits to 2 or more, or {name} to false"
                text = f"{name} needs the copies of aug_splits, which is {cfg.aug_splits}; {remedy}"
                yield Finding((name, "aug_splits"), text)
    elif cfg.mixes:
        # Mixing pairs samples over the whole batch: it would mix an image with the clean copy of another one.
        what, off = ("jsd and ", " and jsd to false") if cfg.jsd else ("", "")
        text = f"{what}aug_splits {cfg.aug_splits} cannot be combined with mixup or cutmix; set aug_splits to 0{off}"
        yield Finding(("aug_splits", "jsd", *_MIXING), f"{text}, or mixup and cutmix to 0")
    for name in ("mixup", "cutmix", "event_mix"):
        if 0 < getattr(cfg, name) < _LEAST_ALPHA:
            text = f"is too small to draw from a beta distribution; use 0 (off), or {_LEAST_ALPHA:g} or more"
            yield _about(cfg, name, text)
    if cfg.mixes and cfg.batch_size % 2:
        remedy = f"use {cfg.batch_size + 1}, or set mixup and cutmix to 0"
        text = f"is odd, and mixup and cutmix pair the samples of a batch; {remedy}"
        yield _about(cfg, "batch_size", text, *_MIXING)
    if cfg.event_mix > 0 and cfg.mixes:
        text = "cannot be combined with mixup or cutmix; set one side to 0"
        yield _about(cfg, "event_mix", text, *_MIXING)
    if cfg.bce_target_thresh is not None and not cfg.bce_loss:
        text = "needs bce_loss; set bce_loss to true, or bce_target_thresh to null"
        yield _about(cfg, "bce_target_thresh", text, "bce_loss")


def _distillation(cfg: Config) -> Iterator[Finding]:
    if cfg.kd == "none":
        return
    if not cfg.teacher:
        remedy = "give the name of a timm model, a checkpoint or a file of logits as teacher"
        yield Finding(("kd", "teacher"), f"kd {cfg.kd} needs a teacher; {remedy}")
    if cfg.aug_splits:
        yield _about(cfg, "kd", "does not fit the copies of aug_splits; set one of them to its default", "aug_splits")


def _training(cfg: Config) -> Iterator[Finding]:
    if cfg.sched_on_updates and cfg.sched == "plateau":
        text = "does not fit sched plateau, which waits for the evaluation; set it to false"
        yield _about(cfg, "sched_on_updates", text, "sched")
    if cfg.warmup_prefix and cfg.sched == "plateau":
        yield _about(cfg, "warmup_prefix", "does not fit sched plateau; set it to false", "sched")
    if cfg.warmup_epochs >= cfg.epochs:
        remedy = f"use warmup_epochs {cfg.epochs - 1} or less, or more epochs"
        yield _about(cfg, "warmup_epochs", f"leaves nothing of epochs {cfg.epochs}; {remedy}", "epochs")
    for name, remedy in _NOT_FOR_EVENTS.items():
        if cfg.dataset in EVENT_DATASETS and getattr(cfg, name):
            yield _about(cfg, name, f"does not fit the event data of {cfg.dataset}: {remedy}", "dataset")


def _measurement(cfg: Config) -> Iterator[Finding]:
    if cfg.from_rates and "energy_mode" in cfg.explicit and cfg.energy_mode != "paper":
        text = "needs the spikes, and from_rates has rates only; leave energy_mode out, or set it to paper"
        yield _about(cfg, "energy_mode", text, "from_rates")
    for name in ("verify", "attention_map", "sweep_T", "energy_extras"):
        if cfg.from_rates and getattr(cfg, name):
            text = f"{name} needs a checkpoint, and from_rates has rates only; leave one of them out"
            yield Finding((name, "from_rates"), text)
    for name in ("verify", "attention_map", "sweep_T", "energy_extras"):
        if cfg.compare and getattr(cfg, name):
            text = f"{name} measures one checkpoint, and compare has several; leave it out, or measure each with resume"
            yield Finding((name, "compare"), text)
    own = [name for name in cfg.explicit if name in OF_A_CHECKPOINT]
    if cfg.compare and own:
        names = ", ".join(sorted(own))
        text = f"with compare, each checkpoint is measured with the model it was trained as; leave out {names}"
        yield Finding((sorted(own)[0], "compare"), text)
    repeated = sorted({steps for steps in cfg.sweep_T or [] if (cfg.sweep_T or []).count(steps) > 1})
    if repeated:
        text = f"sweep_T has {_words(repeated)} more than once; write each number once"
        yield Finding(("sweep_T",), text)


def _words(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
