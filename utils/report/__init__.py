"""Reports of a measurement: terminal, JSON, CSV, figures, HTML page."""
