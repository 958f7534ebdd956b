"""task=evaluate: figures of the validation set."""
