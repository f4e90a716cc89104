"""The picture of a batch: right values, colours and places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from utils.config.parse import config_from
from utils.data.batch_picture import save_batch
from utils.data.loaders import build_loaders


def drawn(x: Tensor, folder: Path, mean: list[float], std: list[float]) -> np.ndarray:
    return np.asarray(Image.open(save_batch(x, mean, std, folder / "batch.png")))


def test_normalisation_is_undone_exactly(tmp_path: Path) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    pixels = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    shape = (1, 3, 1, 1)
    x = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    picture = drawn(x, tmp_path, mean, std)
    assert picture.shape == (2 + 2 * 66, 2 + 3 * 66, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 66, 2 + i % 3 * 66
        assert np.array_equal(picture[top : top + 64, left : left + 64], pixels[i].permute(1, 2, 0).numpy())
    assert (picture[68:, 136:] == 255).all()  # the sixth place is empty


def test_small_images_are_enlarged_and_grey_ones_stay_grey(tmp_path: Path) -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    picture = drawn(x, tmp_path, [0.0], [1.0])
    assert picture.shape == (68, 68, 3)
    assert picture[2:66, 2:66, 0].tolist() == np.kron([[0, 255], [255, 0]], np.ones((32, 32), int)).tolist()
    assert (picture == picture[..., :1]).all()


def test_values_outside_of_the_range_are_clipped(tmp_path: Path) -> None:
    picture = drawn(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), tmp_path, [0.5], [1.0])
    assert (picture[2:66, 2:66] == 0).all()
    assert (picture[2:66, 68:132] == 255).all()


def test_events_have_a_row_of_frames_per_sample_in_two_colours(tmp_path: Path) -> None:
    frames = torch.zeros(2, 3, 2, 64, 64)  # [B, T, C, H, W]
    frames[0, 1, 1] = 4.0  # ON
    frames[1, 2, 0] = 7.0  # OFF
    picture = drawn(frames, tmp_path, [0.0, 0.0], [1.0, 1.0])
    assert picture.shape == (2 + 2 * 66, 2 + 3 * 66, 3)
    colours = [
        [tuple(int(v) for v in picture[30 + 66 * row, 30 + 66 * column]) for column in range(3)] for row in (0, 1)
    ]
    white, vermilion, blue = (255, 255, 255), (213, 94, 0), (0, 114, 178)
    assert colours == [[white, blue, white], [white, white, vermilion]]


def test_no_more_is_drawn_than_one_can_look_at(tmp_path: Path) -> None:
    assert drawn(torch.zeros(300, 1, 64, 64), tmp_path, [0.0], [1.0]).shape == (2 + 8 * 66, 2 + 8 * 66, 3)
    assert drawn(torch.zeros(300, 1, 2, 64, 64), tmp_path, [0.0] * 2, [1.0] * 2).shape == (2 + 8 * 66, 2 + 66, 3)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8), (2, 1, 8, 8)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images .B, C, H, W. or frames"):
        save_batch(torch.zeros(shape), [0.0] * 3, [1.0] * 3, tmp_path / "batch.png")


def test_a_batch_of_the_loader_looks_like_its_images(tmp_path: Path) -> None:
    cfg = config_from(
        {"dataset": "digits", "num_classes": 10, "in_channels": 1, "img_size": 8, "pooling_stat": "0000", "workers": 0,
         "no_aug": True, "val_batch_size": 4}
    )  # fmt: skip
    loaders = build_loaders(cfg, device=torch.device("cpu"))
    images, _ = next(iter(loaders.eval))
    picture = drawn(images, tmp_path, list(loaders.data.mean), list(loaders.data.std))
    loaders.eval.batches.dataset.transform = np.asarray  # type: ignore[attr-defined]
    first, _ = loaders.eval.batches.dataset[0]  # type: ignore[attr-defined]
    assert np.array_equal(picture[2:66:8, 2:66:8, 0], first)
