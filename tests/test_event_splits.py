"""Named splits: the published one is SpikingJelly's, random ones repeat, and the hash tells them apart."""

from __future__ import annotations

import pytest
from recordings import names

from utils.errors import UserError
from utils.events.files import spikingjelly_datasets
from utils.events.splits import Split, check_hash, split_by_folder, split_by_name

CLASSES = ["cat", "dog"]


def tree(per_class: int) -> dict[str, list[str]]:
    return {name: sorted(f"{name}_{i}.npz" for i in range(per_class)) for name in CLASSES}


@pytest.mark.parametrize("per_class", [10, 13, 16, 30, 110])
def test_first90_is_spikingjellys_split(per_class) -> None:
    samples = tree(per_class)
    split = split_by_name(samples, CLASSES, "first90")
    everything = [(f"{name}/{file}", label) for label, name in enumerate(CLASSES) for file in samples[name]]
    theirs = spikingjelly_datasets().split_to_train_test_set(0.9, everything, 2)
    for ours, subset in zip(split, theirs, strict=True):
        assert names(ours) == [everything[i][0] for i in subset.indices]


def test_random_splits_repeat_and_differ_by_seed() -> None:
    first, again, other = (split_by_name(tree(20), CLASSES, f"random:{seed}") for seed in (1, 1, 2))
    assert first == again
    assert first.test != other.test
    for split in (first, other):
        assert (len(split.train), len(split.test)) == (36, 4)
        assert {sample.label for sample in split.test} == {0, 1}
        assert not set(split.train) & set(split.test)


def test_the_hash_depends_on_the_samples_of_each_part_alone() -> None:
    split = split_by_name(tree(20), CLASSES, "first90")
    assert split.hash == split_by_name(tree(20), CLASSES, "first90").hash
    hashes = {split.hash, Split(split.test, split.train).hash, split_by_name(tree(20), CLASSES, "random:0").hash}
    assert len({*hashes, split_by_name(tree(21), CLASSES, "first90").hash}) == 4
    assert len(split.hash) == 16


@pytest.mark.parametrize(
    ("name", "hash"),
    [("first90", "da9a7e6ba8107eca"), ("random:0", "e7e5c5789370e832"), ("random:1", "a54511bf49012480")],
)
def test_a_name_means_the_same_samples_for_ever(name, hash) -> None:
    """A run that goes on, and everybody who names the split, must get the samples it was trained on."""
    assert split_by_name(tree(20), CLASSES, name).hash == hash


def test_another_split_than_expected_is_refused() -> None:
    split = split_by_name(tree(20), CLASSES, "first90")
    check_hash(split, None, "data")
    check_hash(split, split.hash, "data")
    with pytest.raises(
        UserError, match=rf"split_hash: 0123 is another split than that of data, {split.hash} \(36 \+ 4"
    ):
        check_hash(split, "0123", "data")


def test_folders_of_the_set_are_its_split() -> None:
    samples = {
        f"{part}/{name}": [f"{i}.npz" for i in range(n)] for part, n in (("train", 3), ("test", 1)) for name in CLASSES
    }
    split = split_by_folder(samples, CLASSES)
    assert names(split.test) == ["test/cat/0.npz", "test/dog/0.npz"]
    assert [sample.label for sample in split.train] == [0, 0, 0, 1, 1, 1]
