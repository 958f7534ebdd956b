"""task=train: the training loop."""
