"""A flipped bit never loads as another value; files of other programs still load, and what confirmed them is said."""

from __future__ import annotations

import io
import logging
import random
import zipfile

import pytest
import torch

from utils import torch_file
from utils.errors import UserError
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.torch_file import Proof

CONTENT = {"state_dict": {"w": torch.arange(300.0).view(3, 100)}, "epoch": 7, "config": {"lr": 0.25, "name": "a" * 50}}


def written(kind):
    file = io.BytesIO()
    if kind == "ours":
        torch_file.save(CONTENT, file)
    else:
        torch.save(CONTENT, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


def same(found):
    return (
        torch.equal(found["state_dict"]["w"], CONTENT["state_dict"]["w"])
        and {k: found[k] for k in ("epoch", "config")} == {k: CONTENT[k] for k in ("epoch", "config")}
        and found.keys() == CONTENT.keys()
    )


@pytest.mark.parametrize("kind", ["ours", "zip"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, kind):
    whole, path = written(kind), tmp_path / "a.pth"
    draw = random.Random(kind)
    outcomes = []
    for _ in range(400):
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = torch_file.load(path, "a file")[0]
        except UserError as error:
            outcomes.append(str(error))
        else:
            assert same(found), f"bit {bit} changed what was read"
    assert all(message.startswith("a file is ") for message in outcomes)
    # Without a SHA-256, only what has no meaning (the padding between members, dates) may differ.
    assert len(outcomes) > (380 if kind == "ours" else 200)


def test_each_bit_of_a_weight_is_guarded(tmp_path):
    for kind in ("ours", "zip"):
        whole = bytearray(written(kind))
        start = whole.index(CONTENT["state_dict"]["w"].numpy().tobytes())
        for place in range(start, start + 1200, 150):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            (tmp_path / "a.pth").write_bytes(damaged)
            with pytest.raises(UserError, match=r"SHA-256 that it was written with|CRC-32 of its member"):
                torch_file.load(tmp_path / "a.pth", "a file")


@pytest.mark.parametrize(
    ("kind", "proof"), [("ours", Proof.SHA256), ("zip", Proof.CRC), ("old", Proof.NOTHING), ("no crc", Proof.NOTHING)]
)
def test_what_confirms_a_file_is_known(tmp_path, kind, proof):
    torch.serialization.set_crc32_options(kind != "no crc")
    try:
        (tmp_path / "a.pth").write_bytes(written({"no crc": "zip"}.get(kind, kind)))
    finally:
        torch.serialization.set_crc32_options(True)
    found, by = torch_file.load(tmp_path / "a.pth", "a file")
    assert same(found)
    assert by is proof


def test_other_programs_read_our_files(tmp_path):
    write_checkpoint(tmp_path / "a.pth", CONTENT)
    assert same(torch.load(tmp_path / "a.pth", weights_only=True))
    assert same(torch.load(tmp_path / "a.pth", weights_only=True, mmap=True))
    with zipfile.ZipFile(tmp_path / "a.pth") as file:
        assert file.testzip() is None
        assert file.comment.startswith(b"SHA-256 ")


@pytest.mark.parametrize("kind", ["ours", "zip", "old"])
def test_a_checkpoint_without_a_digest_is_said(tmp_path, caplog, kind):
    (tmp_path / "a.pth").write_bytes(written(kind))
    with caplog.at_level(logging.INFO, logger="sdt"):
        read_checkpoint(tmp_path / "a.pth")
    said = {"ours": [], "zip": ["the CRCs of its members"], "old": ["no checksum"]}[kind]
    assert [message.rpartition(": ")[2] for message in caplog.messages] == said
    assert all("has no SHA-256 of its content" in message for message in caplog.messages)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is no regular file"):
        torch_file.load(tmp_path / "pipe", "a file")
