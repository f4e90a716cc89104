"""`python -m utils.predict`: classes, firing rate and energy of single files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import SETTINGS, save

from utils import predict as command
from utils.config.parse import config_from
from utils.data.loaders import build_eval_loader
from utils.errors import UserError
from utils.run.build import build_model

DIGITS = np.load("data/digits/digits.npz")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, and the first two evaluation digits as files in `images`."""
    place = tmp_path_factory.mktemp("predict")
    save(place)
    (place / "images").mkdir()
    values = DIGITS["images"][DIGITS["is_test"]][:2]
    for i, image in enumerate(values):
        scale = 255 // 16 if values.max() <= 16 else 1
        Image.fromarray((image * scale).astype("uint8")).save(place / "images" / f"{i}.png")
    return place


def said(capsys, place, *options):
    assert command.main([str(place / "net.pth.tar"), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_classes_and_probabilities_are_those_of_the_network(place, capsys):
    found = said(capsys, place, str(place / "images"), "--top", "10")
    cfg = config_from(SETTINGS)
    net = build_model(cfg)
    net.load_state_dict(torch.load(place / "net.pth.tar")["state_dict"])
    from utils.data.datasets import resolve_data
    from utils.report.attention_picture import read_images

    paths = [str(place / "images" / f"{i}.png") for i in range(2)]
    x = read_images(paths, resolve_data(cfg), torch.device("cpu"))
    with torch.no_grad():
        expected = net.eval()(x)[0].softmax(1)
    for one, probabilities, path in zip(found, expected, paths, strict=True):
        assert one["file"] == path
        order = [str(int(index)) for index in probabilities.argsort(descending=True)]
        assert [name for name, _ in one["classes"]] == order
        assert [value for _, value in one["classes"]] == pytest.approx(sorted(probabilities.tolist(), reverse=True))


def test_energy_of_two_files_averages_to_that_of_both_together(place, capsys):
    from utils.measure.measurement import Measurement
    from utils.report.attention_picture import read_images
    from utils.run.distributed import Process

    found = said(capsys, place, str(place / "images"))
    cfg = config_from(SETTINGS | {"resume": str(place / "net.pth.tar")})
    measurement = Measurement(cfg, Process(0, 1, torch.device("cpu")))
    paths = [str(place / "images" / f"{i}.png") for i in range(2)]
    x = read_images(paths, measurement.data, torch.device("cpu"))
    both = measurement.measure([(x, torch.zeros(2, dtype=torch.long))])
    assert sum(one["additions"] for one in found) / 2 == pytest.approx(both.energy.operations("AC"), rel=1e-12)
    assert sum(one["energy_uJ"] for one in found) / 2 == pytest.approx(both.energy.total_mJ * 1000, rel=1e-12)
    assert found[0]["additions"] != found[1]["additions"]


def test_names_of_classes_come_from_a_file(place, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"number {i}" for i in range(10)))
    found = said(capsys, place, str(place / "images" / "0.png"), "--class-names", str(tmp_path / "names.txt"))
    assert all(name.startswith("number ") for name, _ in found[0]["classes"])
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 lines for 10 classes"):
        said(capsys, place, str(place / "images" / "0.png"), "--class-names", str(tmp_path / "names.txt"))


def test_maps_are_drawn(place, capsys, tmp_path):
    said(capsys, place, str(place / "images"), "--maps", str(tmp_path / "new" / "maps.png"))
    with Image.open(tmp_path / "new" / "maps.png") as picture:
        assert picture.size[0] > 300


def test_event_files_are_integrated_as_in_the_evaluation(tmp_path, capsys):
    settings = dict(dataset="digits-dvs", in_channels=2, img_size=16)
    path = save(tmp_path, **settings)
    rng = np.random.default_rng(0)
    events = {name: rng.integers(0, 16, 200) for name in ("x", "y")}
    events |= {"t": np.sort(rng.integers(0, 1000, 200)), "p": rng.integers(0, 2, 200)}
    np.savez(tmp_path / "sample.npz", **events)
    (found,) = said(capsys, tmp_path, str(tmp_path / "sample.npz"))
    assert path.exists()
    assert len(found["classes"]) == 5
    assert found["additions"] > 0
    with pytest.raises(UserError, match="no such file"):
        said(capsys, tmp_path, str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize(
    ("files", "words"),
    [(["nothing.png"], "no such file"), (["text.png"], "no image that can be read"), (["empty"], "no file in this")],
)
def test_what_is_no_image_is_refused_by_name(place, tmp_path, files, words, capsys):
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        said(capsys, place, *(str(tmp_path / name) for name in files))


def test_the_evaluation_gives_the_same_input_as_a_file(place):
    """A digit's file holds 16 levels as 8 bits, so values may differ by the rounding of that scale."""
    from utils.data.datasets import resolve_data
    from utils.report.attention_picture import read_images

    cfg = config_from(SETTINGS)
    x = next(iter(build_eval_loader(cfg, device=torch.device("cpu"))))[0][:2]
    paths = [str(place / "images" / f"{i}.png") for i in range(2)]
    from_files = read_images(paths, resolve_data(cfg), torch.device("cpu"))
    assert (from_files - x).abs().max() < 0.25
