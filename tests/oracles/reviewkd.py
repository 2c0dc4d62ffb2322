"""ReviewKD's hierarchical context loss, loop by loop, from arXiv:2104.09044 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean


def pooled(channel: Any, side: int) -> list[Any]:
    """(H, W) -> side * side means; cell i of an axis reaches from floor(i H / side) to ceil((i + 1) H / side)."""
    height, width = len(channel), len(channel[0])
    rows, columns = (
        [range(i * length // side, -(-(i + 1) * length // side)) for i in range(side)] for length in (height, width)
    )
    return [mean([channel[y][x] for y in ys for x in xs]) for ys in rows for xs in columns]


def hcl_loss(maps_s: Any, maps_t: Any) -> Any:
    """Pairs of maps (B, C, H, W): mean squared errors at full size and pooled to 4, 2, 1, at half the weight each."""
    total = 0.0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        sides = [None, *(side for side in (4, 2, 1) if side < len(f_s[0][0]))]
        errors = []
        for side in sides:
            s, t = (
                [x for image in f for channel in image for x in (pooled(channel, side) if side else flat(channel))]
                for f in (f_s, f_t)
            )
            errors.append(mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]))
        weights = [0.5**i for i in range(len(sides))]
        total = total + sum(w * error for w, error in zip(weights, errors, strict=True)) / sum(weights)
    return total
