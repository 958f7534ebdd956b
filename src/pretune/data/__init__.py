"""The data pipeline: from rows of text to batches of token ids."""
