"""Devices, ranks, seeds, progress, loggers and what all commands share."""
