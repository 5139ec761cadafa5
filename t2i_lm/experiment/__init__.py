"""From a config to its module and data, and from a run folder back to its model."""
