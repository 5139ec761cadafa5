"""The study's report: one self-contained page of figures, tables, samples and sources, rendered from run folders."""
