"""FCFD's loss of maps, from arXiv:2304.11832 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean, value


def squared(a: Any, b: Any) -> Any:
    return mean([(x - y) ** 2 for x, y in zip(flat(a), flat(b), strict=True)])


def pooled(maps: Any) -> Any:
    return [[mean([x if value(x) > 0 else 0.0 for x in flat(channel)]) for channel in image] for image in maps]


def appearance_loss(f: Any, f_t: Any, with_pooled: bool) -> Any:
    return squared(f, f_t) + (squared(pooled(f), pooled(f_t)) if with_pooled else 0.0)
