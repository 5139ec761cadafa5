"""Comparison of runs: comparability, endpoints, statistics, plans."""
