"""Probes of finished runs: what is in the data, the weights, the states, the attention and the gradients."""
