"""Where a run's metrics go: files, the console, wandb."""
