"""What is true of the Spike-driven Transformer (V1) only."""
