"""What is true of Spike-driven Transformer V2 alone: its layers and sizes, and its ANN twin."""
