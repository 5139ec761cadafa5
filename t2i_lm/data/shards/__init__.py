"""Token shards: file format, preparation, column access."""
