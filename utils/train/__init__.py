"""The training run: step, optimizer, schedule, files, recovery."""
