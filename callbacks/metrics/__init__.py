"""Metrics that the callbacks report."""
