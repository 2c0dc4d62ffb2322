"""ICKD's loss, loop by loop, from arXiv:2202.03680."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, flat, unit


def correlations(image: Any) -> list[list[Any]]:
    """(C, H, W) -> (C, C): scalar products of the channels, each row at length 1."""
    channels = [flat(channel) for channel in image]
    return [unit([dot(a, b) for b in channels]) for a in channels]


def ickd_loss(f_s: Any, f_t: Any, exponent: int) -> Any:
    """Maps (B, C, H, W); the sum is divided by C and B to the exponent."""
    total = 0.0
    for image_s, image_t in zip(f_s, f_t, strict=True):
        pairs = zip(flat(correlations(image_s)), flat(correlations(image_t)), strict=True)
        total = total + sum((s - t) ** 2 for s, t in pairs)
    return total / (len(f_s[0]) * len(f_s) ** exponent)
