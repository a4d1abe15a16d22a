"""Benchmarks: speed, memory, traffic and numerics of training and generation."""
