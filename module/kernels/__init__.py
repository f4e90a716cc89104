"""Faster ways to compute the parts of the model, with the same result."""
