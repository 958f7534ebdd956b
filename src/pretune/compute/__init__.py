"""Devices and precision: which dtypes are fast, how much a device can compute, and how a step is compiled for it."""
