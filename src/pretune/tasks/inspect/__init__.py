"""task=inspect: compare models, runs and shapes in a table, and by measurement on a run's data."""
