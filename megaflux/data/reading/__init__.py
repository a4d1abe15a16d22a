"""What the loader does with a prepared dataset: order, damaged shards, shared memory."""
