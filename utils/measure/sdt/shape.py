"""The sizes of a Spike-driven Transformer, and from them alone its layers: names and multiply-accumulates.

Sizes of published models can be counted without building them. Legend: D embed_dims, N tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from utils.errors import UserError
from utils.measure.sdt.names import ENTERED_BY, HEAD_LAYER, POSITION_LAYER, QKV, STAGE_LAYERS, layer


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
    def of(model: Any, height: int, width: int) -> SdtShape | None:
        """The sizes that `model` names, for images of height x width; None if it does not name all of them."""
        sizes = {f.name: getattr(model, f.name, None) for f in fields(SdtShape)}
        sizes |= {"mlp_ratio": getattr(model, "mlp_ratios", None), "height": height, "width": width}
        try:
            return SdtShape.read(sizes, "")
        except UserError:
            return None

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
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= -(name == "num_classes"):
                raise UserError(f"{place}: model size {name} is {value!r}; give a positive number")
        return SdtShape(**mapping)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def title(self) -> str:
        return f"SDT {self.depths}-{self.embed_dims}"

    @property
    def description(self) -> str:
        blocks = f"{self.depths} block{'s' * (self.depths > 1)}"
        return f"{blocks}, D = {self.embed_dims}, {self.height} x {self.width} pixels"

    def pools(self, stage: int) -> bool:
        """Whether stage `stage` (0 to 3) ends in a max-pool."""
        return self.pooling_stat[stage] == "1"

    def _grid(self, stage: int) -> int:
        """Pixels of the feature map that stage `stage` (0 to 4) computes on."""
        halved: int = 2 ** self.pooling_stat[:stage].count("1")
        return (self.height // halved) * (self.width // halved)

    @property
    def tokens(self) -> int:
        """N, positions of the feature map after all pools."""
        return self._grid(4)

    @property
    def channels(self) -> int:
        """D, channels of a token."""
        return self.embed_dims

    @property
    def hidden(self) -> int:
        """Channels of the MLP between its layers."""
        return int(self.embed_dims * self.mlp_ratio)

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each layer in one time step, in order of computation."""
        D, N = self.embed_dims, self.tokens
        channels = (self.in_channels, D // 8, D // 4, D // 2, D)
        found = {name: 9 * self._grid(i) * channels[i] * channels[i + 1] for i, name in enumerate(STAGE_LAYERS)}
        found[POSITION_LAYER] = 9 * N * D * D
        for block in range(self.depths):
            for part in (*QKV, *ENTERED_BY):
                width = self.hidden if part.startswith("mlp.") else D
                found[layer(block, part)] = N * D * width
        if self.num_classes:
            found[HEAD_LAYER] = D * self.num_classes
        return found

    def residual_additions_per_step(self) -> int:
        """Additions of membrane shortcuts: one in the patch splitting, two per block (three if the MLP is as wide)."""
        per_block = 3 if self.hidden == self.embed_dims else 2
        return (1 + per_block * self.depths) * self.tokens * self.embed_dims
