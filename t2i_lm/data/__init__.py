"""Sources, token shards and the data order."""
