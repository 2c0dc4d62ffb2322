"""LG's loss, loop by loop, from arXiv:2207.10026, for maps of which one is twice as large."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean


def doubled(line: Any, blend: Any) -> list[Any]:
    """Twice as many entries, at quarters between the given ones; the ends repeat."""
    last = len(line) - 1
    found = []
    for i, x in enumerate(line):
        before, after = line[max(i - 1, 0)], line[min(i + 1, last)]
        found += [blend(x, before), blend(x, after)]
    return found


def bilinear(image: Any) -> list[list[Any]]:
    """(H, W) -> (2H, 2W)."""
    rows = [doubled(row, lambda x, y: 0.75 * x + 0.25 * y) for row in image]
    return doubled(rows, lambda a, b: [0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)])


def lg_loss(f_s: Any, f_t: Any) -> Any:
    if len(f_s[0][0]) < len(f_t[0][0]):
        f_s = [[bilinear(channel) for channel in image] for image in f_s]
    return mean([(s - t) ** 2 for s, t in zip(flat(f_s), flat(f_t), strict=True)])
