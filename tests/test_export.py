"""An exported file computes what its checkpoint computes, and the command finds out where one does not."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from golden_v2 import TOLERANCE, golden_model
from tiny import TINY_RUN, lively, tiny

import model as models  # noqa: F401 -- registers the models
from utils import export as command
from utils.config.parse import config_from
from utils.data.datasets import resolve_data
from utils.errors import UserError
from utils.run import export_formats
from utils.run.build import build_model
from utils.run.checkpoint import write_checkpoint
from utils.run.export_formats import FORMATS, Logits, Source, traced

pytestmark = pytest.mark.slow

SETTINGS = yaml.safe_load(TINY_RUN) | {"workers": 0, "val_batch_size": 20}


def save(folder, **changes):
    """A checkpoint of a small network in which all neurons fire; its path."""
    torch.manual_seed(1)
    cfg = config_from(SETTINGS | changes)
    net = lively(build_model(cfg)).train()
    shape = (8, cfg.time_steps) if cfg.dataset == "digits-dvs" else (8,)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.bias.normal_(std=0.3)
        net(torch.rand(*shape, cfg.in_channels, 16, 16) * 3)  # running statistics that are not 0 and 1
    path = folder / "net.pth.tar"
    write_checkpoint(path, {"state_dict": net.state_dict(), "config": cfg.as_dict(), "epoch": 0})
    return path


def test_program_and_weights_give_the_predictions_of_the_checkpoint(tmp_path, capsys):
    path = save(tmp_path)
    kinds = ["--to", "pt2", "--to", "safetensors"]
    assert command.main([str(path), *kinds, "--into", str(tmp_path), "--samples", "30"]) == 0
    said = capsys.readouterr().out
    assert said.count("30 samples: largest difference of logits") == 2
    assert said.count(" 0 predictions differ") == 2


def test_onnx_gives_them_too_with_standard_operators_and_any_batch(tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = save(tmp_path, spike_mode="plif")
    assert command.main([str(path), "--to", "onnx", "--into", str(tmp_path), "--samples", "30"]) == 0
    assert "30 samples" in (said := capsys.readouterr().out)
    assert " 0 predictions differ" in said
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    (entry,) = graph.input
    assert entry.type.tensor_type.shape.dim[0].dim_param  # a name, not a number


def test_v2_is_traced_merged_with_the_published_logits():
    """Event frames, each of which is the image of the golden data. All formats but the weights begin with the trace."""
    tensors, net = golden_model("t1_h2", T=2)
    frames = tensors["input"][:, None].repeat(1, 2, 1, 1, 1)
    program = traced(net.eval().fuse(), frames[:2].clone()).module()
    torch.testing.assert_close(program(frames), tensors["sweep/logits/T2"], rtol=0, atol=TOLERANCE)


def test_event_frames_and_logits_of_each_step_are_exported(tmp_path):
    net = lively(tiny(in_channels=2, TET=True, T=2, dvs_mode=True)).eval()
    frames = torch.rand(2, 2, 2, 16, 16) * 4
    cfg = config_from(SETTINGS)
    FORMATS["pt2"].write(Source(net, frames, cfg, resolve_data(cfg), None), tmp_path / "net.pt2")
    more = torch.rand(5, 2, 2, 16, 16) * 4  # another batch size than that of the trace
    found = FORMATS["pt2"].load(tmp_path / "net.pt2", net)(more)
    assert torch.equal(found, Logits(net)(more))
    assert found.shape == (5, 5)


def test_the_files_say_what_their_input_is(tmp_path):
    path = save(tmp_path)
    assert command.main([str(path), "--to", "safetensors", "--into", str(tmp_path), "--samples", "2"]) == 0
    from safetensors import safe_open

    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
    assert facts["input"] == ["batch", 1, 8, 8]
    assert facts["mean"] == [0.305]
    assert facts["dataset"] == "digits"


def test_a_file_that_computes_something_else_is_refused(tmp_path, capsys, monkeypatch):
    load = export_formats.Safetensors.load

    def wrong(self, path, model):
        right = load(self, path, model)
        return lambda x: right(x).flip(1)

    monkeypatch.setattr(export_formats.Safetensors, "load", wrong)
    path = save(tmp_path)
    assert command.main([str(path), "--to", "safetensors", "--into", str(tmp_path), "--samples", "10"]) == 1
    said = capsys.readouterr().out
    assert "in 0 of these samples a potential lay within rounding" in said
    assert "do not use these files" in said


def test_a_potential_at_its_threshold_is_found(tmp_path):
    path = save(tmp_path)
    cfg = config_from(SETTINGS)
    net = build_model(cfg)
    net.load_state_dict(torch.load(path)["state_dict"])
    net.eval()
    x = torch.rand(1, 1, 8, 8)
    before = command.near_threshold(net, x)
    with torch.no_grad():
        # A bias that holds one channel's potential at 2, half of which reaches the threshold in the first step.
        net.patch_embed.proj_bn.weight[0] = 0
        net.patch_embed.proj_bn.bias[0] = 2.0
    assert command.near_threshold(net, x) >= before + 64  # all 8 x 8 positions


@pytest.mark.parametrize("kind", ["torchscript", "nir", "tflite"])
def test_what_cannot_be_written_is_refused_with_the_reason(kind):
    with pytest.raises(UserError, match=f"--to {kind}: "):
        command.main(["a.pth.tar", "--to", kind])


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr(export_formats.Onnx, "packages", ("no_such_package",))
    with pytest.raises(UserError, match="pip install no_such_package"):
        command.main(["a.pth.tar", "--to", "onnx"])
