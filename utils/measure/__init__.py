"""Firing rates, operations and energy of a model."""
