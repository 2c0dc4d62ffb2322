"""CAT-KD's loss, loop by loop, from arXiv:2304.12777."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean, unit


def pooled(cam: Any, side: int) -> list[Any]:
    """(H, W) -> means of side * side blocks; H and W are multiples of side."""
    height, width = len(cam) // side, len(cam[0]) // side
    return [
        mean([cam[y][x] for y in range(i * height, (i + 1) * height) for x in range(j * width, (j + 1) * width)])
        for i in range(side)
        for j in range(side)
    ]


def cat_loss(cam_s: Any, cam_t: Any, side: int, normalise: bool) -> Any:
    """CAMs (B, K, H, W)."""
    squares = []
    for image_s, image_t in zip(cam_s, cam_t, strict=True):
        for class_s, class_t in zip(image_s, image_t, strict=True):
            s, t = pooled(class_s, side), pooled(class_t, side)
            s, t = (unit(s), unit(t)) if normalise else (s, t)
            squares += [(a - b) ** 2 for a, b in zip(flat(s), flat(t), strict=True)]
    return mean(squares)
