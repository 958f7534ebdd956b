"""Data formats: how a row becomes text, and which parts of it are scored."""
