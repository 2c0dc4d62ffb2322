"""Paired timings of losses, steps, data, teachers and whole epochs, for ``tools/bench.py``."""
