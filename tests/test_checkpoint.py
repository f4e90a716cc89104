"""Checkpoints: atomic to write, safe to read, loaded wholly or not at all, pruned by metric."""

from __future__ import annotations

import argparse
import errno
import math
import os
import pickle
import re
import resource

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.run.checkpoint import load_weights, read_checkpoint, write_checkpoint
from utils.run.weights import key_difference, weights_in
from utils.train import checkpoint_store
from utils.train.checkpoint_store import BEST, LAST, CheckpointStore
from utils.train.saved_state import saved_state


def net(width=3):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def refused(read, *arguments):
    """The one line that reading ends in."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read_again(tmp_path):
    path = tmp_path / LAST
    state = {"state_dict": net().state_dict(), "epoch": 3, "config": {"lr": 0.1, "T": [1, 2]}, "history": [(0.5, 1)]}
    write_checkpoint(path, state)
    content = read_checkpoint(path)
    assert {key: content[key] for key in ("epoch", "config", "history")} == {
        k: state[k] for k in state if k != "state_dict"
    }
    torch.testing.assert_close(content["state_dict"], dict(state["state_dict"]))
    assert files(tmp_path) == [LAST]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_fails_half_way_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, error):
    path = tmp_path / LAST
    write_checkpoint(path, {"epoch": 1})

    def half(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    message = refused(write_checkpoint, path, {"epoch": 2})
    assert message.startswith(f"cannot write checkpoint {path}: ")
    assert "files written before are untouched" in message
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert files(tmp_path) == [LAST]


def test_an_interruption_while_writing_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / LAST, {"epoch": 1})

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / LAST, {"epoch": 2})
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / LAST) == {"epoch": 1}
    assert files(tmp_path) == [LAST]


@pytest.fixture
def no_large_files():
    """The real thing, as far as an ordinary user can have it: the system lets no file grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_large_files")
def test_a_write_that_the_system_refuses_keeps_the_old_file(tmp_path):
    write_checkpoint(tmp_path / LAST, {"epoch": 1})
    message = refused(write_checkpoint, tmp_path / LAST, {"weights": torch.zeros(100_000)})
    assert message.startswith(f"cannot write checkpoint {tmp_path / LAST}: ")
    assert read_checkpoint(tmp_path / LAST) == {"epoch": 1}
    assert files(tmp_path) == [LAST]


def test_a_missing_folder_is_one_line(tmp_path):
    assert "No such file or directory" in refused(write_checkpoint, tmp_path / "gone" / LAST, {})


def test_a_missing_file_is_one_line(tmp_path):
    assert refused(read_checkpoint, tmp_path / "no.pth") == f"checkpoint {tmp_path / 'no.pth'}: no such file"


def test_a_folder_is_one_line(tmp_path):
    assert refused(read_checkpoint, tmp_path) == f"checkpoint {tmp_path}: is a folder; give a file in it"


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"")

    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)
    assert refused(read_checkpoint, tmp_path / "a.pth").endswith(
        "cannot be read (Permission denied); check the rights there"
    )


def test_a_file_of_text_is_one_line_that_says_what_went_wrong(tmp_path):
    (tmp_path / "a.pth").write_text("junk\n")
    assert re.search(
        r"is damaged or no PyTorch file \(\w+(Error|Exception): .+\); take another copy",
        refused(read_checkpoint, tmp_path / "a.pth"),
    )


def test_a_file_torn_anywhere_is_one_line(tmp_path):
    whole, torn = tmp_path / "whole.pth", tmp_path / "torn.pth"
    write_checkpoint(whole, {"state_dict": net().state_dict()})
    content = whole.read_bytes()
    for length in range(0, len(content), len(content) // 40):
        torn.write_bytes(content[:length])
        assert f"checkpoint {torn} " in refused(read_checkpoint, torn)


def test_a_file_with_a_flipped_byte_loads_or_is_one_line(tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save({"state_dict": net().state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    refusals = []
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            read_checkpoint(path)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not [message for message in refusals if "\n" in message]


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, world\n", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(64), b"epochs: 3\n", b"\x80\x02"],
)
def test_a_foreign_file_is_one_line(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    assert f"checkpoint {tmp_path / 'a.pth'} " in refused(read_checkpoint, tmp_path / "a.pth")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2))])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, save):
    path, trace = tmp_path / "evil.pth", tmp_path / "was_here"
    save({"state_dict": net().state_dict(), "extra": Malicious(trace)}, path)
    assert "is not loaded" in refused(read_checkpoint, path)
    assert not trace.exists()


def test_a_published_file_with_its_command_line_inside_loads(tmp_path):
    path = tmp_path / "published.pth.tar"
    namespace = argparse.Namespace(model="sdt", lr=5e-4, mean=(0.4, 0.5), resume=None)
    prefixed = {f"module.{key}": value for key, value in net().state_dict().items()}
    torch.save({"state_dict": prefixed, "args": namespace, "epoch": 309, "version": 2, "metric": 74.57}, path)
    model = net()
    nn.init.zeros_(model[0].weight)
    content = load_weights(model, path)
    assert content["args"].lr == 5e-4
    torch.testing.assert_close(model.state_dict(), net().state_dict())


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"state_dict": w}])
def test_bare_and_wrapped_weights_load(tmp_path, wrap):
    torch.save(wrap(dict(net().state_dict())), tmp_path / "a.pth")
    model = net()
    nn.init.zeros_(model[0].weight)
    load_weights(model, tmp_path / "a.pth")
    torch.testing.assert_close(model.state_dict(), net().state_dict())


def test_a_prefix_inside_a_name_is_kept():
    weights = {"module.stem.module.weight": torch.zeros(1)}
    assert list(weights_in({"state_dict": weights}, "a.pth")) == ["stem.module.weight"]


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3, "metric": 1.0}, tmp_path / "a.pth")
    assert "has no 'state_dict' (keys: epoch, metric)" in refused(load_weights, net(), tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "a.pth")
    assert "holds a list; expected a dictionary" in refused(load_weights, net(), tmp_path / "a.pth")


def test_every_difference_in_keys_and_shapes_is_listed_and_nothing_is_loaded(tmp_path):
    weights = dict(net(4).state_dict())
    del weights["1.bias"]
    weights["head.weight"] = torch.zeros(1)
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    model = net(3)
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "a.pth")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("does not fit the model, nothing was loaded; give the settings of its training:")
    assert lines[1] == "  1 missing in the file: 1.bias"
    assert lines[2] == "  1 unknown to the model: head.weight"
    assert lines[3].startswith("  3 of another shape: 0.weight: [4, 2] in the file, [3, 2] in the model")
    torch.testing.assert_close(model.state_dict(), net(3).state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_another_size_says_which(tmp_path):
    torch.save({"state_dict": net(4).state_dict(), "config": {"lr": 0.1, "dim": 64, "layer": 2}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"nothing was loaded; give layer 2, dim 64, as it was trained with:\n"):
        load_weights(net(3), tmp_path / "a.pth")


def test_a_long_difference_is_cut():
    expected = {f"layer{i}": torch.zeros(1) for i in range(30)}
    assert key_difference(expected, {}).endswith("layer4, and 25 more")
    assert key_difference(expected, expected) == ""


def test_the_moving_average_is_taken_when_asked_for_and_refused_where_missing(tmp_path):
    weights = dict(net().state_dict())
    average = {key: value + 1 for key, value in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": average}, tmp_path / "both.pth")
    model = net()
    load_weights(model, tmp_path / "both.pth", use_ema=True)
    torch.testing.assert_close(dict(model.state_dict()), average)
    load_weights(model, tmp_path / "both.pth")
    torch.testing.assert_close(dict(model.state_dict()), weights)
    torch.save({"state_dict": weights}, tmp_path / "one.pth")
    with pytest.raises(UserError, match=re.escape("has no moving average of the weights (state_dict_ema)")):
        load_weights(model, tmp_path / "one.pth", use_ema=True)


def saved(folder, metrics, *, decreasing=False):
    store = CheckpointStore(folder, 2, decreasing)
    for epoch, metric in enumerate(metrics):
        store.save({"state_dict": {"w": torch.full((1,), float(epoch))}}, epoch, metric)
    return store


@pytest.mark.parametrize(
    ("decreasing", "metrics", "kept", "best"),
    [
        (False, [10.0, 30.0, 20.0, 5.0], [1, 2], 1),
        (True, [10.0, 30.0, 20.0, 5.0], [0, 3], 3),
        (False, [7.0, 7.0, 7.0], [0, 1], 0),  # of equal ones the first
        (False, [math.nan, 1.0, 3.0], [1, 2], 2),  # NaN is never the best for long
        (True, [math.nan, 3.0, math.nan, 1.0], [1, 3], 3),
    ],
)
def test_history_keeps_the_best_epochs_and_best_and_last_name_theirs(tmp_path, decreasing, metrics, kept, best):
    store = saved(tmp_path, metrics, decreasing=decreasing)
    assert files(tmp_path) == sorted([LAST, BEST, *(f"checkpoint-{epoch}.pth.tar" for epoch in kept)])
    assert read_checkpoint(tmp_path / BEST)["epoch"] == best == store.best[1]
    assert read_checkpoint(tmp_path / LAST)["epoch"] == len(metrics) - 1
    for epoch in kept:
        content = read_checkpoint(tmp_path / f"checkpoint-{epoch}.pth.tar")
        assert (content["epoch"], content["state_dict"]["w"].item()) == (epoch, epoch)


def test_a_resumed_run_goes_on_with_history_and_best(tmp_path):
    saved(tmp_path, [10.0, 30.0])
    store = CheckpointStore(tmp_path, 2, decreasing=False)
    content = read_checkpoint(tmp_path / LAST) | {"optimizer": {"state": {}, "param_groups": []}}
    store.resume(saved_state(content, tmp_path / LAST))
    assert (store.history, store.best) == ([(30.0, 1), (10.0, 0)], (30.0, 1))
    store.save({"state_dict": {}}, 2, 20.0)
    assert files(tmp_path) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar", LAST, BEST]
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 1


def test_at_each_moment_a_checkpoint_of_the_present_epoch_can_be_read(tmp_path, monkeypatch):
    """Of an epoch that ends, the recovery checkpoint goes only after `last` holds the whole epoch."""
    store = saved(tmp_path, [1.0])
    recovery = store.save_recovery({"state_dict": {}}, 1, {"steps": 3})
    seen = []

    def watched(path, state):
        write_checkpoint(path, state)
        seen.append((path.name, recovery.exists()))

    monkeypatch.setattr(checkpoint_store, "write_checkpoint", watched)
    store.save({"state_dict": {}}, 1, 2.0)
    assert seen == [(LAST, True)]
    assert not recovery.exists()


def test_without_hard_links_copies_are_written(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    saved(tmp_path, [1.0, 2.0, 3.0])
    assert files(tmp_path) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar", LAST, BEST]
    assert (tmp_path / BEST).stat().st_nlink == 1
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 2


def test_a_link_that_cannot_be_written_is_one_line_and_keeps_the_old_best(tmp_path, monkeypatch):
    saved(tmp_path, [1.0])
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*arguments):
        raise full

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(checkpoint_store.shutil, "copyfile", refuse)
    store = CheckpointStore(tmp_path, 2, decreasing=False)
    message = refused(store.save, {"state_dict": {}}, 1, 2.0)
    assert "No space left on device" in message
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 0
    assert not [name for name in files(tmp_path) if name.startswith(".")]
