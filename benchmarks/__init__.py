"""Side-by-side measurements against peers: scripts, imported by nothing else."""
