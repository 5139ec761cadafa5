"""Evaluators of trained models, and the report of a run."""
