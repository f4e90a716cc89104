"""The layers of a Spike-driven Transformer from its sizes alone: names, multiply-accumulates, paper's names.

Sizes of published models can be counted without building them. Legend: D embed_dims, N tokens, T time steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from utils.errors import UserError

_BLOCK_LAYERS = {
    "attn.q_conv": "V_S",
    "attn.k_conv": "Q_S",
    "attn.v_conv": "K_S",
    "attn.proj_conv": "linear",
    "mlp.fc1_conv": "MLP layer 1",
    "mlp.fc2_conv": "MLP layer 2",
}
_STAGES = ("proj_conv", "proj_conv1", "proj_conv2", "proj_conv3")


@dataclass(frozen=True)
class SdtShape:
    """The sizes that decide how many operations a Spike-driven Transformer needs. Defaults: 8-512 at 224 x 224."""

    embed_dims: int = 512
    depths: int = 8
    mlp_ratio: float = 4
    height: int = 224
    width: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    pooling_stat: str = "1111"

    @staticmethod
    def of(model: nn.Module, height: int, width: int) -> SdtShape | None:
        """The sizes of a model of the registry for images of height x width; None for another kind of model."""
        named: Any = model
        if not hasattr(model, "pooling_stat") or not hasattr(model, "embed_dims"):
            return None
        return SdtShape(
            named.embed_dims,
            named.depths,
            named.mlp_ratios,
            height,
            width,
            named.in_channels,
            named.num_classes,
            named.pooling_stat,
        )

    @staticmethod
    def read(mapping: Mapping[str, Any], place: str) -> SdtShape:
        """From the `model` part of a file of rates.

        Raises:
            UserError: a size is unknown or no positive number.
        """
        known = {f.name for f in fields(SdtShape)}
        for name, value in mapping.items():
            if name not in known:
                raise UserError(f"{place}: model size {name!r} is unknown; valid: {', '.join(sorted(known))}")
            if name == "pooling_stat":
                if not isinstance(value, str) or not re.fullmatch("[01]{4}", value):
                    raise UserError(f"{place}: pooling_stat {value!r} must be four characters 0 or 1, in quotes")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < (name != "num_classes"):
                raise UserError(f"{place}: model size {name} is {value!r}; give a positive number")
        return SdtShape(**mapping)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _grid(self, stage: int) -> int:
        """Pixels of the feature map that stage `stage` (0 to 4) computes on."""
        halved: int = 2 ** self.pooling_stat[:stage].count("1")
        return (self.height // halved) * (self.width // halved)

    @property
    def tokens(self) -> int:
        """N."""
        return self._grid(4)

    @property
    def hidden(self) -> int:
        """Channels of the MLP between its layers."""
        return int(self.embed_dims * self.mlp_ratio)

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each layer in one time step, in order of computation."""
        D, N = self.embed_dims, self.tokens
        channels = (self.in_channels, D // 8, D // 4, D // 2, D)
        found = {
            f"patch_embed.{name}": 9 * self._grid(i) * channels[i] * channels[i + 1] for i, name in enumerate(_STAGES)
        }
        found["patch_embed.rpe_conv"] = 9 * N * D * D
        for block in range(self.depths):
            for name in _BLOCK_LAYERS:
                width = self.hidden if name.startswith("mlp.") else D
                found[f"block.{block}.{name}"] = N * D * width
        if self.num_classes:
            found["head"] = D * self.num_classes
        return found

    def residual_additions_per_step(self) -> int:
        """Additions of membrane shortcuts: one in the patch splitting, two per block (three if the MLP is as wide)."""
        per_block = 3 if self.hidden == self.embed_dims else 2
        return (1 + per_block * self.depths) * self.tokens * self.embed_dims


def layer_paper_name(name: str) -> str:
    """The paper's name of the layer that the code calls `name`; empty where it has none."""
    if match := re.fullmatch(r"patch_embed\.proj_conv(\d?)", name):
        return f"SPS Conv{int(match[1] or 0) + 1}"
    if name == "patch_embed.rpe_conv":
        return "SPS position conv"
    if match := re.fullmatch(r"block\.(\d+)\.(.+)", name):
        known = _BLOCK_LAYERS.get(match[2]) or ("sum of Q_S * K_S" if match[2] == "attn.kv_sum" else "")
        return f"block {int(match[1]) + 1} {known}" if known else ""
    return "head FC" if name == "head" else ""
