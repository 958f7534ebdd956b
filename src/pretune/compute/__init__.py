"""Arithmetic and the machine: what a device does fast, how much it can do, and how a step is compiled for it."""
