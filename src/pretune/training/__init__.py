"""Components of the training loop: EMA, prefetch, timing, early stopping, signals, NEFTune."""
