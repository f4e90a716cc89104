"""The sizes of a Spike-driven Transformer V2, and from them alone its layers: names and multiply-accumulates.

Legend: C channels, N tokens of the two Transformer stages, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

KV, QKV = ": bmm", ": bmm 2"  # the two products of an attention, as the recorder names them
_REP_CONVS = ("q_conv", "k_conv", "v_conv", "proj_conv")


@dataclass(frozen=True)
class SdtV2Shape:
    """The sizes that decide how many operations a Spike-driven Transformer V2 needs. Defaults: 55M at 224 x 224.

    merged: the form for evaluation, in which convolutions without a neuron between them are one.
    """

    embed_dims: tuple[int, ...] = (128, 256, 512, 640)
    depths: tuple[int, ...] = (6, 2)
    num_heads: int = 8
    mlp_ratio: float = 4
    height: int = 224
    width: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    kd: bool = False
    merged: bool = True

    @staticmethod
    def of(model: Any, height: int, width: int) -> SdtV2Shape | None:
        """The sizes that `model` names, for images of height x width; None if it does not name all of them."""
        dims, depths, heads = (getattr(model, name, None) for name in ("embed_dims", "depths", "num_heads"))
        if not isinstance(dims, (list, tuple)) or not isinstance(depths, (list, tuple)) or not isinstance(heads, int):
            return None
        ratio: Any
        channels: Any
        classes: Any
        ratio, channels, classes = (getattr(model, n, None) for n in ("mlp_ratios", "in_channels", "num_classes"))
        if (len(dims), len(depths)) != (4, 2) or None in (ratio, channels, classes):
            return None
        merged = not any(name.endswith(".body") for name, _ in model.named_modules())
        kd = isinstance(getattr(model, "head_kd", None), nn.Linear)
        return SdtV2Shape(tuple(dims), tuple(depths), heads, ratio, height, width, channels, classes, kd, merged)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def title(self) -> str:
        return f"SDT V2 {'-'.join(map(str, self.embed_dims))}"

    @property
    def description(self) -> str:
        blocks = f"{self.depths[0]} + {self.depths[1]} blocks"
        form = "merged" if self.merged else "as trained"
        return f"{blocks}, D = {', '.join(map(str, self.embed_dims))}, {self.height} x {self.width} pixels, {form}"

    def pixels(self, halvings: int) -> int:
        """Pixels of the feature map after so many stages with stride 2."""
        height, width = self.height, self.width
        for _ in range(halvings):
            height, width = -(-height // 2), -(-width // 2)
        return height * width

    @property
    def tokens(self) -> int:
        """N."""
        return self.pixels(4)

    def blocks(self) -> Iterator[tuple[str, int]]:
        """Name and channels of each Transformer block."""
        for stage in (3, 4):
            for i in range(self.depths[stage - 3]):
                yield f"block{stage}.{i}", self.embed_dims[stage - 1]

    def conv_blocks(self) -> list[tuple[str, int, int]]:
        """Name, channels and pixels of each convolutional block."""
        D1, D2 = self.embed_dims[:2]
        return [
            ("ConvBlock1_1.0", D1 // 2, self.pixels(1)),
            ("ConvBlock1_2.0", D1, self.pixels(2)),
            ("ConvBlock2_1.0", D2, self.pixels(3)),
            ("ConvBlock2_2.0", D2, self.pixels(3)),
        ]

    def attention_macs(self) -> dict[str, int]:
        """Products of k^T v and of q (k^T v), each N C d, of each attention in one time step."""
        return {
            f"{block}.attn{product}": self.tokens * dim * dim // self.num_heads
            for block, dim in self.blocks()
            for product in (KV, QKV)
        }

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each Conv and Linear layer in one time step."""
        D1, D2, D3, D4 = self.embed_dims
        found = {"downsample1_1.encode_conv": 49 * self.in_channels * (D1 // 2) * self.pixels(1)}
        for name, c_in, c_out, halvings in (
            ("downsample1_2", D1 // 2, D1, 2),
            ("downsample2", D1, D2, 3),
            ("downsample3", D2, D3, 4),
            ("downsample4", D3, D4, 4),
        ):
            found[f"{name}.encode_conv"] = 9 * c_in * c_out * self.pixels(halvings)
        for name, channels, pixels in self.conv_blocks():
            found |= {f"{name}.{layer}": macs * pixels for layer, macs in self._conv_block(channels)}
        for block, dim in self.blocks():
            for conv in _REP_CONVS:
                found |= {f"{block}.attn.{conv}{part}": macs for part, macs in self._rep_conv(dim)}
            for layer in ("fc1_conv", "fc2_conv"):
                found[f"{block}.mlp.{layer}"] = self.tokens * dim * int(dim * self.mlp_ratio)
        if self.num_classes:
            found |= dict.fromkeys(("head", "head_kd") if self.kd else ("head",), D4 * self.num_classes)
        return found

    def _conv_block(self, channels: int) -> Iterator[tuple[str, int]]:
        """The layers of a convolutional block, and their products per pixel."""
        inner = 2 * channels
        yield "Conv.pwconv1", channels * inner
        if self.merged:
            yield "Conv.dwconv", 49 * inner * channels  # with pwconv2 in it
        else:
            yield "Conv.dwconv", 49 * inner
            yield "Conv.pwconv2", inner * channels
        for layer in ("conv1", "conv2"):
            yield layer, 9 * channels * int(channels * self.mlp_ratio)

    def _rep_conv(self, dim: int) -> Iterator[tuple[str, int]]:
        if self.merged:
            yield "", 9 * dim * dim * self.tokens
        else:
            yield ".0.body.0", dim * dim * self.tokens
            yield ".0.body.2.0", 9 * dim * self.tokens
            yield ".0.body.2.1", dim * dim * self.tokens

    def residual_additions_per_step(self) -> int:
        """Additions of membrane shortcuts: two per block of either kind."""
        convolutional = sum(channels * pixels for _, channels, pixels in self.conv_blocks())
        return 2 * (convolutional + self.tokens * sum(dim for _, dim in self.blocks()))
