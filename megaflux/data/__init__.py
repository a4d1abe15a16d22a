"""Pictures to training batches: prepare (once) -> MDS shards by aspect bucket -> loader (every run)."""
