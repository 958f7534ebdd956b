"""task=evaluate: metrics of the validation set."""
