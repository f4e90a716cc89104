"""Faults in the data: transforms, splits, order, events, tars."""

from __future__ import annotations

from .mutant import faults

_LOADERS, _SAMPLERS, _TRANSFORMS = "utils/data/loaders.py", "utils/data/samplers.py", "utils/data/transforms.py"
_MIXING, _IMAGES, _LIST = "utils/data/mixing.py", "utils/data/images.py", "utils/data/sample_list.py"
_FACTS, _DEVICE = "utils/data/facts.py", "utils/data/device_loader.py"
_EVENTS, _AUGMENT, _SPLITS = "utils/events/dataset.py", "utils/events/augment.py", "utils/events/splits.py"

MUTANTS = faults(
    "data",
    (
        _EVENTS,
        "operations = frame_operations(cfg) if training else []",
        "operations = frame_operations(cfg)",
        "event data are augmented in the evaluation",
        "test_events.py::test_the_evaluation_is_not_augmented",
    ),
    (
        _EVENTS,
        "dropping=cfg.event_drop and training and not cfg.no_aug",
        "dropping=cfg.event_drop and not cfg.no_aug",
        "events are dropped in the evaluation",
        "test_events.py::test_the_evaluation_is_not_augmented",
    ),
    (
        _LOADERS,
        "if cfg.reprob > 0 and not cfg.no_aug:",
        "if cfg.reprob > 0:",
        "images are erased although no_aug is set",
        "test_loaders.py::test_without_augmentation_nothing_is_erased",
    ),
    (
        _LOADERS,
        "max_count=cfg.recount",
        "max_count=1",
        "recount is ignored",
        "test_loaders.py::test_settings_reach_random_erasing",
    ),
    (
        _LOADERS,
        "first = images[0] if self._spare_first_copy else",
        "first = images[0] if not self._spare_first_copy else",
        "resplit erases the clean copies and spares them otherwise",
        "test_loaders.py::test_resplit_spares_the_clean_copies_from_erasing",
    ),
    (
        _LOADERS,
        "mix_seed(self.seed, pick.epoch, pick.position)",
        "mix_seed(self.seed, pick.position)",
        "a sample is augmented alike in each epoch",
        "test_loaders.py::test_a_sample_is_augmented_anew_in_each_epoch_and_at_each_position",
    ),
    (
        _LOADERS,
        "for copy in copies for image in copy])",
        "for copy in zip(*copies, strict=True) for image in copy])",
        "copies of augmentation splits come sample after sample",
        "test_loaders.py::test_aug_splits_come_copy_after_copy",
    ),
    (
        _TRANSFORMS,
        "hflip=cfg.hflip",
        "hflip=cfg.vflip",
        "hflip takes the probability of vflip",
        "test_datasets.py::test_flips_mirror_the_axis_that_they_name",
    ),
    (
        _TRANSFORMS,
        "scale=tuple(cfg.scale)",
        "scale=(0.08, 1.0)",
        "scale is ignored",
        "test_datasets.py::test_settings_reach_the_transforms_of_training",
    ),
    (
        _TRANSFORMS,
        "crop_pct=settings.crop_pct",
        "crop_pct=1.0",
        "the evaluation does not crop",
        "test_datasets.py::test_large_valid_resizes_to_320_and_crops_288",
    ),
    (
        _SPLITS,
        "generator = np.random.RandomState(random_seed(name)) if",
        "generator = np.random.RandomState(random_seed(name) + 1) if",
        "random:0 is another split than before",
        "test_event_splits.py::test_a_name_means_the_same_samples_for_ever",
    ),
    (
        _SPLITS,
        "count = math.ceil(len(files) * _TRAIN_SHARE)",
        "count = round(len(files) * _TRAIN_SHARE)",
        "the published split is rounded otherwise",
        "test_event_splits.py::test_first90_is_spikingjellys_split",
    ),
    (
        _AUGMENT,
        "(_integer(-most, most), _integer(-most, most)), dims=(-2, -1))",
        "(_integer(-most, most),) * 2, dims=(-2, -1))",
        "frames roll along the diagonal only",
        "test_event_augment.py::test_roll_shifts_each_axis_by_itself_up_to_the_limit",
    ),
    (
        _AUGMENT,
        "return F.hflip(frames)",
        "return F.vflip(frames)",
        "events are flipped upside down",
        "test_event_augment.py::test_flip_mirrors_left_and_right",
    ),
    (
        _AUGMENT,
        "kept[torch.randperm(count)[: int(count",
        "kept[torch.arange(count)[: int(count",
        "random dropping takes the first events",
        "test_event_augment.py::test_random_dropping_takes_events_from_all_of_the_recording",
    ),
    (
        _SAMPLERS,
        "[self.rank :: self.world_size][: len(self)]",
        "[: len(self)]",
        "all processes train on the same samples",
        "test_samplers.py::test_training_shards_are_disjoint_and_equal",
    ),
    (
        _SAMPLERS,
        "return range(rank, length, world_size)",
        "return range(rank, length - length % world_size, world_size)",
        "the last samples are not evaluated",
        "test_samplers.py::test_evaluation_covers_each_sample_once",
    ),
    (
        _SAMPLERS,
        "manual_seed(mix_seed(self.seed, self.epoch))",
        "manual_seed(mix_seed(self.seed))",
        "each epoch has the same order",
        "test_samplers.py::test_order_changes_with_epoch_and_seed_and_repeats_with_both",
    ),
    (
        _IMAGES,
        "* 255 // 16).astype(np.uint8)",
        "* 15).astype(np.uint8)",
        "full ink of the digits is 240",
        "test_datasets.py::test_digits_are_grey_images_of_the_full_range",
    ),
    (
        _LIST,
        'numbers.get(text.removeprefix("./")) if named',
        "numbers.get(text) if named",
        "./class/image is no sample of the list",
        "test_sample_list.py::test_paths_choose_files_of_an_image_folder",
    ),
    (
        _LIST,
        "if index is None or index >= len(dataset):",
        "if index is None or index > len(dataset):",
        "a number just behind the last sample is accepted",
        "test_sample_list.py::test_numbers_that_do_not_fit_are_refused",
    ),
    (
        _MIXING,
        "return mixed, labels * weight + labels.roll(1, 0) * (1.0 - weight)",
        "return mixed, labels * weight + labels.roll(-1, 0) * (1.0 - weight)",
        "EventMix takes the label of another sample than it mixes",
        "test_mixing.py::test_event_mix_gives_the_other_label_its_share",
    ),
    (
        _DEVICE,
        "torch.tensor(values).mul_(unit)",
        "torch.tensor(values)",
        "bytes are normalised by the statistics of 0 to 1",
        "test_loaders.py::test_normalising_on_the_device_equals_normalising_in_the_workers",
    ),
    (
        _FACTS,
        "values *= cfg.in_channels",
        "values += (0.0,) * (cfg.in_channels - 1)",
        "one value for all channels is that of the first",
        "test_datasets.py::test_settings_come_from_the_config_before_the_facts",
    ),
)
