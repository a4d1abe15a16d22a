"""Training: stages, updates, checkpoints, fault handling, planning, reports."""
