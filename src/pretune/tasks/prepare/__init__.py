"""task=prepare: a run's data, tokenized and cached."""
