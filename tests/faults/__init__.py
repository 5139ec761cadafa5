"""Seeded faults of runs: `make test-faults` injects the full counts, the test suite a few of each."""
