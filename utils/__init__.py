"""Everything around the model: settings, data, training, measurement, reports."""

from pathlib import Path

# The folder of the repository.
ROOT = Path(__file__).resolve().parent.parent
