"""task=plan: parameters, memory and speed of a run before its first step."""
