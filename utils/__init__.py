"""Everything around the model: configuration, data, training loop, measurement and reports."""
