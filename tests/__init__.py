"""The tests. Each process computes in one thread, and so do those that it starts; set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
