"""Files of a run: metrics, events, checkpoints."""
