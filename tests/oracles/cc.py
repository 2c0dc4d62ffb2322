"""CC's loss, loop by loop, as RepDistiller's documentation describes it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .complex_step import absolute


def cc_loss(embed_s: Any, embed_t: Any) -> Any:
    """Embeddings (B, D) of both networks."""
    apart = [[absolute(s - t) for s, t in zip(*rows, strict=True)] for rows in zip(embed_s, embed_t, strict=True)]
    total = 0.0
    for here, following in pairwise(apart):
        total = total + sum(a * b for a, b in zip(here, following, strict=True))
    return total / max(len(apart) - 1, 1)
