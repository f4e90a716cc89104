"""What the published code of V1 calls its spike tensors and layers, and what the paper calls them.

The code's q is the paper's V_S; the code's k and v are its Q_S and K_S (supplement, table S1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

STAGE_TENSORS = tuple(f"MS_SPS_lif{i or ''}" for i in range(4))
STAGE_LAYERS = tuple(f"patch_embed.proj_conv{i or ''}" for i in range(4))
POSITION_LAYER = "patch_embed.rpe_conv"
HEAD_TENSOR, HEAD_LAYER = "head_lif", "head"

# Of a block: its first spike tensor, the layers q, k, v with the tensors they end in, the sum over tokens, and the
# other layers with the tensors that enter them.
BLOCK_INPUT = "first_lif"
QKV = {"attn.q_conv": "q_lif", "attn.k_conv": "k_lif", "attn.v_conv": "v_lif"}
TOKEN_SUM = "attn.kv_sum"
ENTERED_BY = {"attn.proj_conv": "x_after_qkv", "mlp.fc1_conv": "fc1_lif", "mlp.fc2_conv": "fc2_lif"}

_IN_BLOCK = {
    BLOCK_INPUT: "input",
    "q_lif": "V_S",
    "k_lif": "Q_S",
    "v_lif": "K_S",
    "kv_before": "Q_S * K_S",
    "kv": "g(Q_S, K_S)",
    "x_after_qkv": "SDSA output, masked V_S",
    "fc1_lif": "MLP layer 1",
    "fc2_lif": "MLP layer 2",
}
_IN_BLOCK |= {part: _IN_BLOCK[tensor] for part, tensor in (QKV | ENTERED_BY).items()}  # a layer and its tensor
_IN_BLOCK |= {TOKEN_SUM: "sum of Q_S * K_S", "attn.proj_conv": "linear"}
_OTHERS = {POSITION_LAYER: "SPS position conv", HEAD_TENSOR: "head FC", HEAD_LAYER: "head FC"}
_OTHERS |= {name: f"SPS Conv{i + 1}" for names in (STAGE_TENSORS, STAGE_LAYERS) for i, name in enumerate(names)}


def tensor(block: int, part: str) -> str:
    """The name of a spike tensor of a block."""
    return f"MS_{'MLP' if part.startswith('fc') else 'SSA'}_Conv{block}_{part}"


def layer(block: int, part: str) -> str:
    """The name of a layer of a block."""
    return f"block.{block}.{part}"


def paper_name(name: str) -> str:
    """The paper's name of the spike tensor or layer that the code calls `name`; empty where it has none."""
    if match := re.fullmatch(r"(?:MS_(?:SSA|MLP)_Conv|block\.)(\d+)[_.](.+)", name):
        part = _IN_BLOCK.get(match[2])
        return f"block {int(match[1]) + 1} {part}" if part else ""
    return _OTHERS.get(name, "")


def token_sums(model: nn.Module) -> dict[str, nn.Module]:
    """For each block, the module whose output self-attention sums over tokens, under the sum's name.

    That sum has no weights, so no Conv or Linear layer shows it: the product of the spikes, after the event-mode pool.
    """
    places = {f"{name}.attn.kv_pool": f"{name}.{TOKEN_SUM}" for name, _ in model.named_modules()}
    return {places[name]: module for name, module in model.named_modules() if name in places}


def map_tensors(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of the spike tensors with these names, the pairs that attention maps show: V_S and masked V_S of a block."""
    known = set(names)
    pairs = ((name, f"{name.removesuffix('q_lif')}x_after_qkv") for name in names if name.endswith("_q_lif"))
    return [pair for pair in pairs if pair[1] in known]
