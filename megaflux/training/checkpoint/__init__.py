"""Checkpoints of a run: writing, verifying, resuming."""
