"""Image transforms: from a PIL image to a tensor [C, H, W], built with timm's factory.

The tensor is uint8 where the device normalises (`DataSettings.normalise_on_device`), else normalised float32.
Random erasing is not here but in utils.data.loaders: it leaves out the first copies of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torchvision.transforms import Compose

from utils.config.settings import Config
from utils.data.facts import DataSettings
from utils.data.images import pil_mode, to_mode
from utils.errors import UserError


def eval_transform(settings: DataSettings) -> Compose:
    """Resize, centre crop, and normalise where the device does not."""
    transform = create_transform(
        settings.eval_size,
        interpolation=settings.interpolation,
        crop_pct=settings.crop_pct,
        mean=settings.mean,
        std=settings.std,
        use_prefetcher=settings.normalise_on_device,
    )
    return Compose([_to_mode(pil_mode(settings.input_size[0])), *transform.transforms])


def train_transform(cfg: Config, settings: DataSettings) -> Compose | tuple[Compose, Compose, Compose]:
    """Crop, flip, colour, policy; with `aug_splits` in the three parts that AugMixDataset takes."""
    if cfg.aug_splits and cfg.no_aug:
        raise UserError("aug_splits: needs augmentation, but no_aug is on; leave one of them out")
    interpolation = cfg.train_interpolation
    if cfg.no_aug:
        interpolation = cfg.interpolation or "bicubic"
    built = create_transform(
        settings.input_size,
        is_training=True,
        no_aug=cfg.no_aug,
        scale=tuple(cfg.scale),
        ratio=tuple(cfg.ratio),
        hflip=cfg.hflip,
        vflip=cfg.vflip,
        color_jitter=cfg.color_jitter,
        auto_augment=cfg.aa or None,
        interpolation=interpolation,
        mean=settings.mean,
        std=settings.std,
        use_prefetcher=settings.normalise_on_device,
        separate=cfg.aug_splits > 0,
    )
    parts: tuple[Compose, ...] = built if cfg.aug_splits else (built,)
    for part in parts:
        _allow_posterize_to_zero_bits(part)
        if settings.input_size[0] == 1:
            _apply_policies_in_colour(part)
    first = Compose([_to_mode(pil_mode(settings.input_size[0])), *parts[0].transforms])
    return (first, parts[1], parts[2]) if cfg.aug_splits else first


def _to_mode(mode: str) -> Callable[[Image.Image], Image.Image]:
    """Makes an image grey ('L') or RGB, whatever the file holds (palette, alpha, CMYK)."""
    return partial(to_mode, mode=mode)


def _allow_posterize_to_zero_bits(transform: Compose) -> None:
    # The published policies (m9, mstd0.4) sometimes reach magnitude 10, which keeps 0 bits: a black image. Newer
    # versions of Pillow raise a ValueError for 0 bits, which would end the run.
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _apply_policies_in_colour(transform: Compose) -> None:
    # timm's policies are written for RGB; AugMix of older releases fails on grey images.
    steps: list[Any] = []
    for step in transform.transforms:
        is_policy = hasattr(step, "ops") or hasattr(step, "policy")
        steps += [_to_mode("RGB"), step, _to_mode("L")] if is_policy else [step]
    transform.transforms = steps


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep)
