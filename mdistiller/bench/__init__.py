"""How long things take: paired timings of losses, steps, data, teachers and whole epochs, for ``tools/bench.py``."""
