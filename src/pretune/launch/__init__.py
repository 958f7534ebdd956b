"""From the command line to a plain mapping: the only package that knows Hydra."""
