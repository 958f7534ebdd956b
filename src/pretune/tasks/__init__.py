"""The tasks that a user can run: train, prepare, evaluate, generate, export, report, plan."""
