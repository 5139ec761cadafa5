"""Language models: decoders, checkpoints, vocabulary expansion, freezing, loss, generation."""
