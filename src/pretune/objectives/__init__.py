"""Training objectives: language modeling and preference optimization."""
