"""Code that every package may use: base classes for configuration, batches, atomic files, progress bars."""
