"""Checkpoints: save, load, select and resume."""
