"""Reading the golden data: numbers of the published implementation, in float64 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
FORWARD_FILES = ("image_lif", "image_plif", "imagenet_lif", "image_t1_h4", "dvs_tet")

# Table S1's names of a tensor -> the published code's, in block i (from 0) where it lies in one.
_TABLE_S1_NAMES = {
    "Conv1": "MS_SPS_lif",
    "Conv2": "MS_SPS_lif1",
    "Conv3": "MS_SPS_lif2",
    "Conv4": "MS_SPS_lif3",
    "Input": "MS_SSA_Conv{}_first_lif",
    "VS": "MS_SSA_Conv{}_q_lif",
    "QS": "MS_SSA_Conv{}_k_lif",
    "KS": "MS_SSA_Conv{}_v_lif",
    "g(QS, KS)": "MS_SSA_Conv{}_kv",
    "Output of SDSA(·), hat VS": "MS_SSA_Conv{}_x_after_qkv",
    "Layer 1": "MS_MLP_Conv{}_fc1_lif",
    "Layer 2": "MS_MLP_Conv{}_fc2_lif",
    "FC": "head_lif",
}


def load_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def table_s1() -> dict[str, dict[str, Any]]:
    """The published rates of 8-512, a row per tensor, by the published code's name of it."""

    def name(row: dict[str, Any]) -> str:
        block = int(row["section"][1:]) - 1 if row["section"].startswith("B") else None
        return _TABLE_S1_NAMES[row["tensor"]].format(block)

    return {name(row): row for row in load_json("paper_table_s1_8_512")["rows"]}


def load_tensors(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `meta` dictionary and all tensors of one safetensors file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key starts with `prefix/`, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def model_arguments(cfg: dict[str, Any]) -> dict[str, Any]:
    """The golden files' `img_size` as the two arguments of the model."""
    arguments = dict(cfg)
    size = arguments.pop("img_size")
    return arguments | {"img_size_h": size, "img_size_w": size}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).abs().max() / scale)
