"""task=plan: estimate parameters, memory, speed and loss of a run before its first step."""
