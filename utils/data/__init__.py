"""Images and their loaders."""
