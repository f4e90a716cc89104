"""The ANN twin: the same layers with real values, one pass, and softmax attention; compared with the spiking network.

Legend: D channels of a token, N tokens.
"""

from __future__ import annotations

from utils.measure.energy import COSTS, Cost, EnergyReport
from utils.measure.models.workload import Product
from utils.measure.sdt.names import QKV, TOKEN_SUM, layer
from utils.measure.sdt.shape import SdtShape
from utils.measure.twin import Comparison

# f(Q, K, V), the two matrix products of attention: as table 1 prints it (2 N N D), and as the published totals need
# it (2 N D D: 41.77 mJ for 8-512).
ATTENTION_MACS = ("printed", "paper")


def attention_macs(shape: SdtShape, convention: str = "printed") -> int:
    """Products of one block's f(Q, K, V), scale (N N) and softmax (2 N N, charged as a MAC too).

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in ATTENTION_MACS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(ATTENTION_MACS)}")
    N, D = shape.tokens, shape.channels
    return 2 * N * D * (N if convention == "printed" else D) + 3 * N * N


def attention_products(shape: SdtShape, convention: str = "printed") -> list[Product]:
    """The products of all blocks' attention, with the activations they read and write.

    Q, K and V are read once and the output is written once: the N x N map between the two products is never stored.
    """
    values = shape.tokens * shape.channels
    rest = 3 * shape.tokens**2  # scale and softmax
    f = attention_macs(shape, convention) - rest
    found = []
    for block in range(shape.depths):
        found.append(Product(layer(block, "attn.f"), f, inputs=3 * values, operands=values, outputs=values))
        found.append(Product(layer(block, "attn.softmax"), rest, elementwise=True))
    return found


def ann_macs(shape: SdtShape, convention: str = "printed") -> int:
    """Everything the twin computes for one image: all layers, position conv and head included."""
    return sum(shape.macs().values()) + shape.depths * attention_macs(shape, convention)


def attention_twin_pJ(shape: SdtShape, convention: str = "printed", cost: Cost = COSTS["fp32"]) -> float:
    """Energy of one block's Q, K, V, f, scale and softmax in the ANN. The published 87.2 needs `paper`."""
    projections = 3 * shape.tokens * shape.channels**2
    return cost.mac * (projections + attention_macs(shape, convention))


def compare(shape: SdtShape, spiking: EnergyReport, convention: str = "printed") -> Comparison:
    """The twin beside one accounting of the spiking network."""
    macs, cost = ann_macs(shape, convention), spiking.cost
    parts = {layer(block, part) for block in range(shape.depths) for part in (*QKV, TOKEN_SUM)}
    attention = sum(row.energy_pJ for row in spiking.rows if row.name in parts) / shape.depths
    twin = attention_twin_pJ(shape, convention, cost)
    formula = "2 N² D, as printed" if convention == "printed" else "2 N D², as the published totals"
    return Comparison(convention, formula, macs, macs * cost.mac, spiking.total_pJ, twin, attention)
