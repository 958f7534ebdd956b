"""ExecuTorch: a static cache, lowering to .pte, and running a .pte as a model."""
