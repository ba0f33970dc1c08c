"""The shard runtime: a contiguous range of a model's layers, and the head where sampling happens."""
