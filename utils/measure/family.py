"""What is known of a model beyond what can be counted of any: its family, the models of one publication.

This file alone imports the packages of the families. A further family has what `SdtFamily` has.
"""

from __future__ import annotations

from torch import nn

from utils.measure.sdt.ann_twin import Comparison
from utils.measure.sdt.family import SdtFamily
from utils.measure.sdt.names import map_tensors
from utils.measure.sdt.rates_file import charge as published_rates

__all__ = ["Comparison", "Family", "family_of", "map_tensors", "published_rates"]

Family = SdtFamily


def family_of(model: nn.Module, height: int, width: int) -> Family | None:
    """The family that a model belongs to by its sizes, for images of height x width; None if there is none.

    Whether its layers are that family's too shows when it runs: `Family.why_not`.
    """
    return SdtFamily.of(model, height, width)
