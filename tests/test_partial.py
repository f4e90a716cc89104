"""--initial-partial: what fits by name and shape is loaded, the rest is listed, and nothing at all is an error."""

from __future__ import annotations

import logging

import pytest
import torch

from model import sdt
from utils.errors import UserError
from utils.run.checkpoint import write_checkpoint
from utils.run.partial import load_partial

TINY = {"img_size": 16, "num_classes": 5, "embed_dims": 16, "num_heads": 4, "depths": 1, "pooling_stat": "0011"}


def tiny(**changes):
    return sdt(**(TINY | changes))


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    model = tiny(num_classes=7, spike_mode="plif")
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3})
    return path, model


def test_what_fits_is_loaded_and_the_rest_is_listed(checkpoint, caplog):
    path, source = checkpoint
    model = tiny()  # 5 classes, and neurons without a weight
    head, there = model.head.weight.clone(), source.state_dict()
    with caplog.at_level(logging.INFO):
        load_partial(model, path)
    assert torch.equal(model.head.weight, head)
    same = [key for key, value in model.state_dict().items() if not key.startswith("head.")]
    assert all(torch.equal(model.state_dict()[key], there[key]) for key in same)
    first, *lines = caplog.messages[0].splitlines()
    loaded = f"{len(same)} of {len(same) + 2} tensors are from {path}"
    assert first == f"initial_partial: {loaded}; the others keep their initial values:"
    assert lines[0].startswith("  14 unknown to the model: patch_embed.proj_lif.w; ")
    assert lines[1].startswith("  2 of another shape: head.weight: [7, 16] in the file, [5, 16] in the model")


def test_a_checkpoint_of_which_all_fits_says_so(checkpoint, caplog):
    path, source = checkpoint
    model = tiny(num_classes=7, spike_mode="plif")
    with caplog.at_level(logging.INFO):
        load_partial(model, path)
    count = len(model.state_dict())
    assert caplog.messages == [f"initial_partial: {count} of {count} tensors are from {path}, which is all"]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_nothing_that_fits_is_an_error_and_counters_do_not_count_as_fitting(tmp_path):
    model = tiny(embed_dims=32, pooling_stat="0001")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    only_counters = tmp_path / "b.pth.tar"
    counters = {key: value + 9 for key, value in before.items() if "num_batches" in key}
    write_checkpoint(only_counters, {"state_dict": counters | {"other": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"fits the model by name and shape:\n.* missing in the file"):
        load_partial(model, only_counters)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
