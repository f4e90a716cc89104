"""Attention maps: what they average, and their picture."""

from __future__ import annotations

import torch
from measuring import fresh_weights, run
from PIL import Image

from model import sdt
from utils.data.facts import DataSettings
from utils.measure.attention_map import attention_maps
from utils.report.attention_picture import to_pictures


def test_attention_maps_of_image_files(measured, full):
    for name in ("one.png", "two.png"):
        Image.new("RGB", (40, 30), (200, 30, 90)).save(measured / name)
    _, report = run(measured, "files", "--attention-map", str(measured / "one.png"), str(measured / "two.png"))
    assert report["attention_maps"] == ["attention.png"]
    with Image.open(measured / "out" / "files" / "attention.png") as picture:
        assert picture.width > picture.height


def test_attention_maps_are_mean_rates_per_token():
    model = sdt(img_size=16, in_channels=1, num_classes=10, embed_dims=16, num_heads=2, depths=2, T=3,
                                   pooling_stat="0001")  # fmt: skip
    weights = {k: v for k, v in fresh_weights(0).items() if v.shape == model.state_dict()[k].shape}
    model.load_state_dict(weights, strict=False)
    x = torch.randn(2, 1, 16, 16)
    maps = attention_maps(model.eval(), x)
    assert maps.vs.shape == maps.masked.shape == (2, 2, 8, 8)
    with torch.no_grad():
        _, hook = model(x, hook={})
    for block in range(2):
        q = hook[f"MS_SSA_Conv{block}_q_lif"]  # [T, B, D, H', W']
        torch.testing.assert_close(maps.vs[block], q.mean(dim=(0, 2)))
        assert bool((maps.masked[block] <= maps.vs[block] + 1e-6).all())  # the mask only takes away
    assert float(maps.vs.max()) > 0


def test_events_below_an_attention_map_have_the_colours_of_other_pictures():
    frames = torch.zeros(2, 3, 2, 4, 4)  # [B, T, C, H, W]
    frames[0, :, 0, 0, 0] = 2.0  # OFF
    frames[1, 1, 1, 0, 0] = 5.0  # ON
    pictures = (to_pictures(frames, DataSettings((2, 4, 4), (2, 4, 4), (0, 0), (1, 1), "", 1.0, False)) * 255).round()
    assert pictures.shape == (2, 4, 4, 3)
    assert pictures[:, 0, 0].tolist() == [[213, 94, 0], [0, 114, 178]]
    assert bool((pictures[:, 1:] == 255).all())
