"""The sizes of a Spike-driven Transformer, and from them alone its layers: names and multiply-accumulates.

Sizes of published models can be counted without building them. Legend: D embed_dims, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field
from pydantic.types import Strict

from utils.errors import UserError, shortened
from utils.measure.sdt.names import ENTERED_BY, HEAD_LAYER, POSITION_LAYER, QKV, STAGE_LAYERS, layer
from utils.schema import Finite, checked

_Pixels = Annotated[int, Strict(), Field(ge=1, le=10_000)]


@dataclass(frozen=True)
class SdtShape:
    """The sizes that decide how many operations a Spike-driven Transformer needs. Defaults: 8-512 at 224 x 224."""

    embed_dims: Annotated[int, Strict(), Field(ge=8, le=65536)] = 512
    depths: Annotated[int, Strict(), Field(ge=1, le=1000)] = 8
    mlp_ratio: Annotated[Finite, Field(gt=0, le=64)] = 4
    height: _Pixels = 224
    width: _Pixels = 224
    in_channels: Annotated[int, Strict(), Field(ge=1, le=1024)] = 3
    num_classes: Annotated[int, Strict(), Field(ge=0, le=1_000_000)] = 1000
    pooling_stat: Annotated[str, Strict(), Field(pattern="^[01]{4}$")] = "1111"

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
            UserError: a size is unknown, or outside of what a model can have.
        """
        known = [f.name for f in fields(SdtShape)]
        if unknown := [name for name in mapping if name not in known]:
            raise UserError(
                f"{place}: model size {shortened(unknown[0])} is unknown; valid: {', '.join(sorted(known))}"
            )
        return checked(SdtShape, dict(mapping), f"{place}: model", "give the sizes of a model")

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
