"""Text generation: sampling, beam search, stop strings. It needs only a model interface, token ids and text."""
