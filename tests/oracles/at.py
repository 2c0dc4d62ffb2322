"""AT's loss, loop by loop, from arXiv:1612.03928, Eq. 2, as a mean over images and positions."""

from __future__ import annotations

from typing import Any

from .complex_step import absolute, flat, mean, unit


def attention(image: Any, p: int) -> list[Any]:
    """One map (C, H, W) -> its positions: the sum over the channels of |A|^p, at length 1."""
    return unit([sum(absolute(x) ** p for x in position) for position in zip(*map(flat, image), strict=True)])


def at_loss(f_s: Any, f_t: Any, p: int) -> Any:
    """Maps (B, C_s, H, W) and (B, C_t, H, W)."""
    maps = ((attention(s, p), attention(t, p)) for s, t in zip(f_s, f_t, strict=True))
    return mean([(a - b) ** 2 for both in maps for a, b in zip(*both, strict=True)])
