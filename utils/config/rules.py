"""Combinations of settings that cannot work (errors) or do nothing (warnings), each with its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from utils.config.field import shown
from utils.config.settings import EVENT_DATASETS, SETTINGS, Config

EVENT_DATA = ("event_split", "split_hash", "event_wire", "tet_counts")
EVENT_AUGMENTATIONS = tuple(name for name, s in SETTINGS.items() if s.rules.group == "Event augmentation")


class Finding(NamedTuple):
    """What is wrong about the settings `names`; the first one names the place in a message."""

    names: tuple[str, ...]
    message: str


def impossible(cfg: Config) -> Iterator[Finding]:
    """The combinations in `cfg` that cannot work."""
    for rules in (_unavailable, _model, _pixels, _image, _ranges, _splits, _mixing, _events, _training, _measurement):
        yield from rules(cfg)


def ignored(cfg: Config) -> Iterator[Finding]:
    """The settings in `cfg` that differ from their default without any effect."""
    for name, setting in SETTINGS.items():
        value = getattr(cfg, name)
        if setting.rules.no_effect and value != setting.default:
            yield Finding((name,), f"{name} {shown(value)} has no effect: {setting.rules.no_effect}")
    if cfg.dataset not in EVENT_DATASETS and not cfg.plugin:  # a plugin may bring event data
        for name in (*EVENT_DATA, *EVENT_AUGMENTATIONS):
            if getattr(cfg, name) != SETTINGS[name].default:
                message = f"{name} {shown(getattr(cfg, name))} has no effect: dataset {cfg.dataset} holds images"
                yield Finding((name,), message)
    if cfg.TET_lamb != 0 and not cfg.TET:
        yield Finding(("TET_lamb",), f"TET_lamb {cfg.TET_lamb:g} is ignored without TET; set TET: true to use it")
    if cfg.lr_base is not None and "lr" in cfg.explicit:
        yield Finding(("lr",), f"lr {cfg.lr:g} is ignored: lr_base {cfg.lr_base:g} sets the learning rate")
    if cfg.amp_dtype != "auto" and not cfg.amp:
        yield Finding(("amp_dtype",), f"amp_dtype {cfg.amp_dtype} is ignored without amp; set amp: true to use it")
    if cfg.engine != "dense" and cfg.device.startswith("cuda"):
        yield Finding(("engine", "device"), f"engine {cfg.engine} is ignored on {cfg.device}; its kernels run on a CPU")
    if cfg.bf16_input_grad and cfg.engine == "dense":
        yield Finding(
            ("bf16_input_grad",), "bf16_input_grad true is ignored with engine dense; set engine: auto to use it"
        )


def _unavailable(cfg: Config) -> Iterator[Finding]:
    for name, setting in SETTINGS.items():
        value, reason = getattr(cfg, name), setting.rules.unavailable
        if reason and value != setting.default:
            default = shown(setting.default)
            yield Finding(
                (name,),
                f"{name} {shown(value)} is not available in this version: {reason}; leave {name} at {default}",
            )


def _model(cfg: Config) -> Iterator[Finding]:
    if cfg.plugin:
        return  # a plugin may bring another model; each model checks its sizes when it is built
    if cfg.dim % 8:
        yield Finding(
            ("dim",), f"dim {cfg.dim} is not divisible by 8 (patch splitting starts from dim / 8 channels); "
            f"the nearest valid ones are {cfg.dim // 8 * 8} and {(cfg.dim // 8 + 1) * 8}"
        )  # fmt: skip
    if cfg.dim % cfg.num_heads:
        fitting = [heads for heads in range(1, 33) if cfg.dim % heads == 0]
        yield Finding(
            ("num_heads", "dim"),
            f"dim {cfg.dim} is not divisible by num_heads {cfg.num_heads}; num_heads can be {_words(fitting)}",
        )


def _pixels(cfg: Config) -> Iterator[Finding]:
    if cfg.input_size and cfg.input_size[0] != cfg.in_channels:
        yield Finding(
            ("input_size", "in_channels"),
            f"input_size {cfg.input_size} starts with {cfg.input_size[0]} channels, in_channels is "
            f"{cfg.in_channels}; make them equal",
        )
    if cfg.input_size and cfg.img_size and cfg.input_size[1:] != [cfg.img_size] * 2:
        yield Finding(
            ("input_size", "img_size"),
            f"input_size {cfg.input_size} and img_size {cfg.img_size} disagree; give only one of them",
        )
    factor = 1 if cfg.plugin else 2 ** cfg.pooling_stat.count("1")  # as in _model
    sides = {"img_size": [cfg.img_size or 0], "input_size": (cfg.input_size or [])[1:]}
    for name, values in sides.items():
        for side in sorted({side for side in values if side % factor}):
            # MaxPool2d(3, stride 2, padding 1) gives ceil(n / 2): an odd size no longer tiles the image.
            lower = side // factor * factor
            fitting = [size for size in (lower, lower + factor) if size]
            yield Finding(
                (name, "pooling_stat"),
                f"{name} {side} is not divisible by {factor}, which pooling_stat {cfg.pooling_stat} needs; "
                f"use {_words(fitting)}, or fewer 1 in pooling_stat",
            )


def _image(cfg: Config) -> Iterator[Finding]:
    for name, values in (("mean", cfg.mean), ("std", cfg.std)):
        if values is not None and len(values) not in (1, cfg.in_channels):
            yield Finding(
                (name, "in_channels"),
                f"{name} {values} has {len(values)} values, in_channels is {cfg.in_channels}; "
                "give one value per channel, or one for all",
            )


def _ranges(cfg: Config) -> Iterator[Finding]:
    for name in ("scale", "ratio", "cutmix_minmax", "lr_noise"):
        values = getattr(cfg, name) or []
        if values != sorted(values):
            first, last = values
            yield Finding((name,), f"{name} [{first:g}, {last:g}] descends; write [{last:g}, {first:g}]")


def _splits(cfg: Config) -> Iterator[Finding]:
    if cfg.aug_splits == 1:
        yield Finding(("aug_splits",), "aug_splits 1 splits nothing; use 0 (off), or 2 or more")
    if cfg.aug_splits < 2:
        for name in ("jsd", "split_bn", "resplit"):
            if getattr(cfg, name):
                yield Finding(
                    (name, "aug_splits"),
                    f"{name} needs the copies of aug_splits, which is {cfg.aug_splits}; "
                    f"set aug_splits to 2 or more, or {name} to false",
                )
    elif cfg.mixes:
        # Mixing pairs samples over the whole batch: it would blend an image with another one's clean copy.
        also = "jsd and " if cfg.jsd else ""
        yield Finding(
            ("aug_splits", "jsd", "mixup", "cutmix", "cutmix_minmax"),
            f"{also}aug_splits {cfg.aug_splits} cannot be combined with mixup or cutmix; "
            f"set aug_splits to 0{' and jsd to false' if cfg.jsd else ''}, or mixup and cutmix to 0",
        )


def _mixing(cfg: Config) -> Iterator[Finding]:
    if cfg.mixes and cfg.batch_size % 2:
        yield Finding(
            ("batch_size", "mixup", "cutmix", "cutmix_minmax"),
            f"batch_size {cfg.batch_size} is odd, and mixup and cutmix pair the samples of a batch; "
            f"use {cfg.batch_size + 1}, or set mixup and cutmix to 0",
        )
    if cfg.bce_target_thresh is not None and not cfg.bce_loss:
        yield Finding(
            ("bce_target_thresh", "bce_loss"),
            f"bce_target_thresh {cfg.bce_target_thresh:g} needs bce_loss; "
            "set bce_loss to true, or bce_target_thresh to null",
        )


def _events(cfg: Config) -> Iterator[Finding]:
    if cfg.event_mix > 0 and cfg.mixes:
        yield Finding(
            ("event_mix", "mixup", "cutmix", "cutmix_minmax"),
            f"event_mix {cfg.event_mix:g} cannot be combined with mixup or cutmix; set one side to 0",
        )
    if cfg.dataset not in EVENT_DATASETS:
        return
    instead = {
        "aug_splits": "leave it out",
        "reprob": "it would erase another place in each frame; use event_cutout",
        "train_split_path": "it lists images; use event_split",
    }
    for name, remedy in instead.items():
        if getattr(cfg, name):
            value = shown(getattr(cfg, name))
            yield Finding((name, "dataset"), f"{name} {value} does not fit the event data of {cfg.dataset}: {remedy}")


def _training(cfg: Config) -> Iterator[Finding]:
    if cfg.warmup_epochs >= cfg.epochs:
        yield Finding(
            ("warmup_epochs", "epochs"),
            f"warmup_epochs {cfg.warmup_epochs} leaves nothing of epochs {cfg.epochs}; "
            f"use warmup_epochs {cfg.epochs - 1} or less, or more epochs",
        )
    starts = [name for name in ("resume", "initial_checkpoint", "initial_partial") if getattr(cfg, name)]
    if len(starts) > 1:
        yield Finding(
            tuple(reversed(starts)),
            f"{' and '.join(f'{name} {getattr(cfg, name)}' for name in starts)} exclude each other; use resume to "
            "continue a run, initial_checkpoint to start a new one, initial_partial to start one from what fits",
        )
    if cfg.sync_bn and cfg.split_bn:
        yield Finding(
            ("split_bn", "sync_bn"), "sync_bn and split_bn exclude each other; set one of them to false"
        )  # fmt: skip


def _measurement(cfg: Config) -> Iterator[Finding]:
    if cfg.from_rates and cfg.resume:
        yield Finding(
            ("from_rates", "resume"),
            f"from_rates {cfg.from_rates} and resume {cfg.resume} exclude each other; "
            "use resume to measure a checkpoint, from_rates for rates that were measured before",
        )
    if cfg.from_rates and "energy_mode" in cfg.explicit and cfg.energy_mode != "paper":
        yield Finding(
            ("energy_mode", "from_rates"),
            f"energy_mode {cfg.energy_mode} needs the spikes, and from_rates has rates only; "
            "leave energy_mode out, or set it to paper",
        )
    for name in ("verify", "attention_map", "sweep_T", "energy_extras"):
        if cfg.from_rates and getattr(cfg, name):
            yield Finding(
                (name, "from_rates"), f"{name} needs a checkpoint, and from_rates has rates only; leave one of them out"
            )
    repeated = sorted({steps for steps in cfg.sweep_T or [] if (cfg.sweep_T or []).count(steps) > 1})
    if repeated:
        yield Finding(("sweep_T",), f"sweep_T has {_words(repeated)} more than once; write each number once")


def _words(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
