"""Data sources, token shards, data order and data modules."""
