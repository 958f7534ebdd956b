"""task=export: a run's model as files that other programs load."""
