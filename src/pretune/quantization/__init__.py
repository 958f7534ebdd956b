"""Quantization, applied to a model from outside."""
