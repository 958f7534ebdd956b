"""How a row becomes text, and which of it is scored."""
