"""Parameter groups, optimizers, schedules and budgets."""
