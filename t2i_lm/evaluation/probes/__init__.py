"""Probes of a language model: held-out text, questions, completions, and lm-evaluation-harness' requests."""
