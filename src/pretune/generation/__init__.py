"""Letting a model continue texts: sampling, beams, stop strings. Knows a model-like interface, token ids and text."""
