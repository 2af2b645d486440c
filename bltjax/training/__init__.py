"""The trainer and its parts: optimizer, steps, checkpoints, resuming, reports."""
