"""A run: its configuration, its folder, and the assembly of its parts."""
