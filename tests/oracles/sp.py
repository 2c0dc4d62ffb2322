"""SP's loss, loop by loop, from arXiv:1907.09682, Eq. 1 to 3."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, flat, mean, unit


def similarities(maps: Any) -> list[list[Any]]:
    """(B, ...) -> (B, B): scalar products of the images, each row at length 1."""
    rows = [flat(image) for image in maps]
    return [unit([dot(a, b) for b in rows]) for a in rows]


def sp_loss(f_s: Any, f_t: Any) -> Any:
    rows = zip(similarities(f_s), similarities(f_t), strict=True)
    return mean([(s - t) ** 2 for both in rows for s, t in zip(*both, strict=True)])
