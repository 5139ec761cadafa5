"""Token shards: format, preparation and columns."""
