"""NORM's loss, loop by loop, from arXiv:2305.13803."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean


def norm_loss(wide: Any, f_t: Any) -> Any:
    """Maps (B, N * C, H, W) and (B, C, H, W): each part of C channels against the teacher's map."""
    channels = len(f_t[0])
    total = 0.0
    for part in range(len(wide[0]) // channels):
        mine = [image[part * channels : (part + 1) * channels] for image in wide]
        total = total + mean([(s - t) ** 2 for s, t in zip(flat(mine), flat(f_t), strict=True)])
    return total
