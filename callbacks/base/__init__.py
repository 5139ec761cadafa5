"""Interfaces and base classes of the callbacks."""
