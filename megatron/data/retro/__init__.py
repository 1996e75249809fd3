"""Chunks of token files, and the neighbours of each chunk of a run's samples (Retro, arXiv:2112.04426)."""
