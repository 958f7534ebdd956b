"""What surrounds a training step: averages of the weights, prefetch, timing, early stopping, signals, noise."""
