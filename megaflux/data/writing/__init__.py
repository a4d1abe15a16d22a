"""Sources of images -> a prepared dataset: items, chunks, their worker processes, the merge."""
