"""The study's figures, rendered from run folders."""
