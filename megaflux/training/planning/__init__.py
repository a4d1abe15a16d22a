"""What a run needs and costs before it begins: memory, FLOPs, micro-batch, dry run."""
