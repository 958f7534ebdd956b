"""Estimate the memory of training before anything is allocated."""
