"""Where a run's figures go: files, the console, wandb."""
