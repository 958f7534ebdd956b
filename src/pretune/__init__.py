"""Pretune: one YAML-driven loop that pretrains a small language model and then fine-tunes it."""
