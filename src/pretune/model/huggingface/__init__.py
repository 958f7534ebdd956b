"""Models of the Hugging Face hub: their architectures and names for weights."""
