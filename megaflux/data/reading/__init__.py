"""Draw the samples of a dataset: open it, in which order, at which position, around damage, within /dev/shm."""
