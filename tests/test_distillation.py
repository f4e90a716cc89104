"""Distillation as settings ask for it: kinds of teachers, what they see, V1 with one head, and clear refusals."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import TINY_RUN
from torch import nn

import train
from utils.config.parse import config_from
from utils.errors import UserError
from utils.run.build import build_model
from utils.run.checkpoint import load_weights, read_checkpoint
from utils.run.distributed import Process
from utils.run.precision import Precision
from utils.train.losses import DistillationLoss
from utils.train.teacher import ModelTeacher, StoredLogits, make_teacher

pytestmark = pytest.mark.slow

PROCESS = Process(0, 1, torch.device("cpu"))
DIGITS = {"dataset": "digits", "in_channels": 1, "num_classes": 10, "img_size": 16, "kd": "hard"}


def teacher_of(settings):
    cfg = config_from(DIGITS | settings)
    return make_teacher(cfg, PROCESS, Precision(cfg, PROCESS.device))


def test_a_model_with_one_head_learns_labels_and_teacher_with_it():
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = DistillationLoss(nn.CrossEntropyLoss(), "hard", alpha=0.25)
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(logits, teacher.argmax(1))
    torch.testing.assert_close(loss(logits, labels, teacher), expected)
    other = torch.randn(4, 5)
    assert not torch.equal(loss((logits, other), labels, teacher), expected)


def test_a_teacher_of_timm_sees_the_images_as_it_was_trained_on_them(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10, in_chans=3).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    own = {
        "dataset": "torch/cifar10",
        "in_channels": 3,
        "img_size": 32,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    teacher = teacher_of(own | {"teacher": "test_resnet", "teacher_checkpoint": str(tmp_path / "net.pth")})
    assert isinstance(teacher, ModelTeacher)
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    wanted = net.pretrained_cfg
    with torch.no_grad():
        expected = net(normalised(wanted["mean"], wanted["std"]))
    torch.testing.assert_close(
        teacher(normalised(own["mean"], own["std"]), torch.zeros(2)), expected, rtol=1e-4, atol=1e-5
    )
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "kd hard needs a teacher"),
        ({"teacher": "resnet18", "aug_splits": 2}, "does not fit the copies of aug_splits"),
        ({"teacher": "resnet8000"}, "'resnet8000' is neither a file nor a model of timm; did you mean"),
        ({"teacher": "no/such.pth"}, "checkpoint no/such.pth: no such file"),
        ({"teacher": "sdt_8_512"}, "is neither a file nor a model of timm"),
        ({"teacher": "WITHOUT"}, "holds neither 'logits' nor the 'config' of a run"),
        ({"teacher": "FEW"}, "has 3 classes, num_classes is 10"),
        ({"teacher": "FLAT"}, r"must be a floating-point tensor \[samples, classes\]"),
        ({"teacher": "GOOD", "mixup": 0.5}, "do not fit mixed ones"),
        ({"teacher": "vit_tiny_patch16_224", "teacher_checkpoint": "VIT"}, r"cannot take input \[2, 1, 16, 16\]"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_message(settings, message, tmp_path):
    files = {"WITHOUT": {"a": torch.zeros(2)}, "FEW": {"logits": torch.zeros(9, 3)}, "FLAT": {"logits": torch.zeros(9)},
             "GOOD": {"logits": torch.zeros(9, 10)}}  # fmt: skip
    if "VIT" in settings.values():
        files["VIT"] = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1).state_dict()
    for name in files.keys() & settings.values():
        torch.save(files[name], tmp_path / f"{name}.pth")
        settings = {key: str(tmp_path / f"{name}.pth") if value == name else value for key, value in settings.items()}
    with pytest.raises(UserError, match=message):
        teacher_of(settings)


def test_stored_logits_follow_the_numbers_of_the_samples():
    stored = StoredLogits(torch.arange(12.0).view(6, 2), "a.pth", torch.device("cpu"))
    assert stored(torch.zeros(2, 3), torch.tensor([[7, 4], [8, 0]])).tolist() == [[8.0, 9.0], [0.0, 1.0]]
    with pytest.raises(UserError, match="logits of 6 samples, the training set has 5; store one row for each"):
        stored.check_length(5)


def test_the_second_head_starts_fresh_where_a_file_has_none_and_nothing_else_does(tmp_path):
    sizes = {"model": "sdt_v2", "embed_dims": [4, 8, 8, 8], "depths": [1, 1], "num_heads": 2, "num_classes": 10}
    torch.manual_seed(0)
    first, second = (build_model(config_from(sizes | kd)) for kd in ({}, {"kd": "hard", "teacher": "resnet18"}))
    torch.save({"model": first.state_dict()}, tmp_path / "a.pth")
    fresh = second.head_kd.weight.clone()
    load_weights(second, tmp_path / "a.pth", fresh=("head_kd.",))
    assert torch.equal(second.head_kd.weight, fresh)
    assert torch.equal(second.block3[0].mlp.fc1_conv.weight, first.block3[0].mlp.fc1_conv.weight)
    with pytest.raises(UserError, match="2 missing in the file: head_kd"):
        load_weights(second, tmp_path / "a.pth")
    partly = dict(second.state_dict())
    del partly["head_kd.bias"]
    torch.save({"model": partly}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"1 missing in the file: head_kd\.bias"):
        load_weights(second, tmp_path / "b.pth", fresh=("head_kd.",))


V2 = ["--model", "sdt_v2", "--embed-dims", "4", "8", "8", "8", "--depths", "1", "1", "--time-steps", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of V1, then one of V1 and one of V2 that learn from it, the last of these from stored logits."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "run.yml").write_text(
        TINY_RUN + "val_batch_size: 180\nworkers: 0\ndevice: cpu\nkernels: plain\nepochs: 1\ncooldown_epochs: 0\n"
    )
    torch.save({"logits": torch.randn(1437, 10)}, folder / "stored.pt")
    teacher = str(folder / "first/last.pth.tar")
    for name, words in {
        "first": [],
        "v1": ["--kd", "soft", "--kd-tau", "2", "--teacher", teacher],
        "v2": ["--kd", "hard", "--teacher", str(folder / "stored.pt"), *V2],
    }.items():
        argv = ["-c", str(folder / "run.yml"), "--output", str(folder), "--experiment", name, *words]
        assert train.main(argv) == 0
    return folder


def test_runs_of_both_versions_learn_from_checkpoints_and_stored_logits(runs):
    first, v1, v2 = (read_checkpoint(runs / name / "last.pth.tar") for name in ("first", "v1", "v2"))
    assert v1["state_dict"].keys() == first["state_dict"].keys()
    assert (v1["config"]["kd"], v1["config"]["kd_tau"]) == ("soft", 2.0)
    assert any(not torch.equal(v1["state_dict"][key], value) for key, value in first["state_dict"].items())
    assert {"head_kd.weight", "head_kd.bias"} <= v2["state_dict"].keys()
    assert v2["config"]["embed_dims"] == [4, 8, 8, 8]
    assert not any(key.startswith("teacher") for key in v2["state_dict"])
    json.dumps(v2["config"])


def test_a_run_starts_from_another_one_at_another_number_of_time_steps(runs):
    argv = ["-c", str(runs / "run.yml"), "--output", str(runs), "--experiment", "t4", *V2, "--time-steps", "4"]
    argv += ["--kd", "hard", "--teacher", str(runs / "first/last.pth.tar")]
    assert train.main([*argv, "--initial-checkpoint", str(runs / "v2/last.pth.tar")]) == 0
    assert read_checkpoint(runs / "t4/last.pth.tar")["config"]["time_steps"] == 4
