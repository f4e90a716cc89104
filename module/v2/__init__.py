"""Building blocks of Spike-driven Transformer V2 ("Meta-SpikeFormer", Yao et al., ICLR 2024, arXiv 2404.03663)."""
