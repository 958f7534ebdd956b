"""task=evaluate: measure metrics on the validation set."""
