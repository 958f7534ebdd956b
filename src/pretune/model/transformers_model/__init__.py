"""Models that transformers builds and computes, behind the interface of our Transformer."""
