"""SemCKD's attention and loss, loop by loop, from arXiv:2012.03236."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, flat, mean, softmax, unit, value


def linear(x: Any, weight: Any, bias: Any) -> list[Any]:
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def description(maps: Any, image: int, layers: Any) -> list[Any]:
    """Of one image of (B, ...), by two pairs of weight and bias."""
    rows = [flat(one) for one in maps]
    hidden = linear([dot(rows[image], other) for other in rows], *layers[0])
    return unit(linear([x if value(x) > 0 else 0.0 for x in hidden], *layers[1]))


def attention(maps_s: Any, maps_t: Any, layers_s: Any, layers_t: Any, soft: float) -> list[Any]:
    """(B, S, T)."""
    found = []
    for image in range(len(maps_s[0])):
        queries = [description(maps, image, layers) for maps, layers in zip(maps_s, layers_s, strict=True)]
        keys = [description(maps, image, layers) for maps, layers in zip(maps_t, layers_t, strict=True)]
        found.append([softmax([dot(query, key) / soft for key in keys]) for query in queries])
    return found


def semckd_loss(weights: Any, distances: Any) -> Any:
    """(B, S, T) each."""
    rows = [row for image in zip(weights, distances, strict=True) for row in zip(*image, strict=True)]
    return mean([dot(*row) for row in rows])
