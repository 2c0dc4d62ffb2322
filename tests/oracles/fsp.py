"""FSP's loss, loop by loop, from Yim et al., CVPR 2017, Eq. 1 and 2, for maps of one size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .complex_step import dot, flat, mean


def matrices(first: Any, second: Any) -> list[Any]:
    """Maps (B, C, H, W) and (B, D, H, W): the entries of all images' matrices."""
    return [
        dot(flat(c), flat(d)) / len(flat(c))
        for of_a, of_b in zip(first, second, strict=True)
        for c in of_a
        for d in of_b
    ]


def fsp_loss(g_s: Any, g_t: Any) -> Any:
    total = 0.0
    for pair_s, pair_t in zip(pairwise(g_s), pairwise(g_t), strict=True):
        entries = zip(matrices(*pair_s), matrices(*pair_t), strict=True)
        total = total + mean([(s - t) ** 2 for s, t in entries])
    return total
