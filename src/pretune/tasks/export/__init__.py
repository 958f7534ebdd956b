"""task=export: write a run's model for other programs."""
