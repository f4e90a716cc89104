"""Reading the golden data of V2: numbers of the published implementation, in float64 on a CPU."""

from __future__ import annotations

from golden import load_tensors, under
from torch import Tensor, nn

from model import sdt_v2

FORWARD_FILES = ("t1_h2", "t4_h4", "t3_h1_nonsquare", "t2_full_depth", "t2_kd_odd_size")
# The golden data's README: logits, losses and membrane means agree to 1e-9, gradients to 1e-9 of the largest one in the
# file (some are zero in exact arithmetic), running statistics to 1e-10.
TOLERANCE = 1e-9
STATISTICS = 1e-10


def golden_model(name: str, state: str = "state", **changes: object) -> tuple[dict[str, Tensor], nn.Module]:
    """All tensors of one file, images in float64, and the model that they are of."""
    meta, tensors = load_tensors(f"v2/{name}")
    model = sdt_v2(**(meta["kwargs"] | changes)).double()
    model.load_state_dict(under(tensors, state), strict=True)
    for key in {"input", "inputs"} & tensors.keys():
        tensors[key] = tensors[key].double()
    return tensors, model


def largest(gradients: dict[str, Tensor]) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())
