"""Turn the command line into a plain configuration mapping; the only package that uses Hydra."""
