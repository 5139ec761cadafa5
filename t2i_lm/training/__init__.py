"""One run, its Trainer and strategies, and several runs at once."""
