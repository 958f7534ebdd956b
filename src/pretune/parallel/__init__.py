"""Training in several processes, each with a device of its own."""
