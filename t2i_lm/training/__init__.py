"""One run with its Trainer, callbacks and strategy; plans of several runs."""
