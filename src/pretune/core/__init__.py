"""What every package may use: the base of configuration sections, batches, atomic files, progress bars."""
