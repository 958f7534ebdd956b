"""ExecuTorch: a static cache, lowering, and its runtime as a model."""
