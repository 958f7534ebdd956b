"""A run: its configuration, its folder, and its parts put together."""
