"""Weights in fewer bits, done to a model from outside."""
