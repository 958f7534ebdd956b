"""Data sources: the Hugging Face hub, files, this Python's documentation, generated word problems."""
