"""Devices, ranks, seeds, progress, loggers and the shared command line."""
