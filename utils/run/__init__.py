"""What training and measurement share: model, checkpoint, precision, processes."""
