"""task=prepare: tokenize and cache a run's data."""
