"""Seeds, and saved states of the random generators.

The library's own draws in training are functions of seed, epoch and sample index and need no state. Initial weights,
layers such as dropout, and methods of other projects use the generators.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch

from mdistiller.functional import draws

PROCESSES = zlib.crc32(b"random generators of processes")


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (on all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Seed the generators of one of several processes for a step. The first process keeps the run's generators."""
    seed_everything(seed if rank == 0 else int(draws.hash_keys(seed, PROCESSES, rank, step)) % 2**63)


def random_state() -> dict[str, Any]:
    """The state of all generators, in types that load without the execution of code."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state of :func:`random_state`. An empty state changes nothing."""
    if not state:
        return
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def restorable(state: dict[str, Any]) -> bool:
    """Whether :func:`restore_random_state` accepts a state. The generators do not change."""
    before = random_state()
    try:
        restore_random_state(state)
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError):
        return False
    finally:
        restore_random_state(before)
    return True
