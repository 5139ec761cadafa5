"""Files that the callbacks write."""
