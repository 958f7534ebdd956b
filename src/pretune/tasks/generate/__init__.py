"""task=generate: generate text with a run's model."""
