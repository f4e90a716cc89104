"""A model folder builds and loads itself in timm, and is a checkpoint for the scripts."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from test_export import save

from utils import export as command
from utils.config.parse import config_from
from utils.errors import UserError
from utils.run import model_folder
from utils.run.checkpoint import load_weights, read_checkpoint, settings_inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    assert command.main([str(save(place)), "--to", "hub", "--into", str(place), "--samples", "8"]) == 0
    return place / "net-hub"


def test_timm_builds_it_with_its_weights(folder):
    net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    trained = torch.load(folder.parent / "net.pth.tar")["state_dict"]
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert (net.T, net.embed_dims, net.num_classes) == (2, 16, 10)


def test_timm_gives_it_another_head(folder):
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    trained = torch.load(folder.parent / "net.pth.tar")["state_dict"]
    assert net.head.weight.shape[0] == 3
    assert torch.equal(net.patch_embed.proj_conv.weight, trained["patch_embed.proj_conv.weight"])


def test_it_is_a_checkpoint_with_its_settings(folder):
    assert settings_inside(folder)["dim"] == 16
    net = timm.create_model(f"local-dir:{folder}", pretrained=False)
    load_weights(net, folder)
    assert torch.equal(net.head.weight, read_checkpoint(folder)["state_dict"]["head.weight"])


def test_a_damaged_folder_is_refused_with_the_remedy(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="--to hub"):
        read_checkpoint(tmp_path)


def test_the_card_has_the_figures_of_a_report_of_these_weights_only(folder, tmp_path):
    import hashlib

    checkpoint = folder.parent / "net.pth.tar"
    energy = {"mode": "exact", "cost": {"name": "fp32"}, "total_mJ": 0.0021, "ac_operations": 1234567.0}
    report = {
        "checkpoint": {"sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
        "top1_percent": 98.76,
        "top5_percent": 99.9,
        "samples": 360,
        "time_steps": 2,
        "mean_firing_rate": 0.0812,
        "energy": energy | {"mac_operations": 89.0},
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    options = [str(checkpoint), "--to", "hub", "--into", str(tmp_path), "--samples", "2", "--report", str(file)]
    assert command.main(options) == 0
    card = (tmp_path / "net-hub" / "README.md").read_text()
    for figure in ("98.76%", "0.0812", "1,234,567", "2.100 µJ", "dim: 16"):
        assert figure in card
    file.write_text(json.dumps(report | {"checkpoint": {"sha256": "0" * 64}}))
    with pytest.raises(UserError, match="another checkpoint"):
        command.main(options)


@pytest.mark.parametrize(("name", "paper"), [("sdt", "2307.01694"), ("sdt_v2", "2404.03663")])
def test_the_card_names_the_paper_of_the_model(name, paper):
    card = model_folder.model_card(config_from({"model": name}), None)
    assert card.count("arXiv") == 1
    assert f"arXiv {paper}" in card


def test_pretrained_without_a_source_is_refused():
    with pytest.raises(ValueError, match="local-dir:FOLDER"):
        timm.create_model("sdt_2_256", pretrained=True)


def test_an_upload_sends_the_folder(folder, monkeypatch):
    import huggingface_hub

    sent = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, name, exist_ok):
            return type("Repository", (), {"repo_id": name})

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model_folder.upload(folder, "me/net") == "https://huggingface.co/me/net"
    assert sent == [("me/net", str(folder))]


def test_a_hub_that_refuses_gives_its_reason(folder, monkeypatch):
    import huggingface_hub

    def refuses(*args, **kwargs):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuses)
    with pytest.raises(UserError, match=r"401 Unauthorized.*hf auth login"):
        model_folder.upload(folder, "me/net")
