"""Building blocks of the Spike-driven Transformer."""

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv
from module.mlp import MS_MLP_Conv
from module.neuron import make_neuron
from module.sps import MS_SPS

__all__ = ["MS_SPS", "MS_Block_Conv", "MS_MLP_Conv", "MS_SSA_Conv", "make_neuron"]
