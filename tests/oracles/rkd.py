"""RKD's loss, loop by loop, from arXiv:1904.05068: means over all pairs and triples, equal images too."""

from __future__ import annotations

from typing import Any

from .complex_step import absolute, dot, mean, norm, unit, value


def huber(x: Any) -> Any:
    return 0.5 * x * x if abs(value(x)) < 1 else absolute(x) - 0.5


def distances_and_angles(embeddings: Any, squared: bool) -> tuple[list[Any], list[Any]]:
    """(B, D) -> the distances of all pairs over the mean of different images', and the cosines of all triples."""
    images = range(len(embeddings))
    gap = [[[b - a for a, b in zip(embeddings[i], embeddings[j], strict=True)] for j in images] for i in images]
    lengths = [norm(gap[i][j]) for i in images for j in images]
    distances = [length**2 if squared else length for length in lengths]
    mu = sum(distances) / (len(images) * (len(images) - 1))
    direction = [[unit(vector) for vector in row] for row in gap]
    cosines = [dot(direction[i][j], direction[i][k]) for i in images for j in images for k in images]
    return [distance / mu for distance in distances], cosines


def rkd_loss(f_s: Any, f_t: Any, squared: bool, distance_weight: float, angle_weight: float) -> Any:
    (d_s, a_s), (d_t, a_t) = (distances_and_angles(f, squared) for f in (f_s, f_t))
    distance = mean([huber(s - t) for s, t in zip(d_s, d_t, strict=True)])
    angle = mean([huber(s - t) for s, t in zip(a_s, a_t, strict=True)])
    return distance_weight * distance + angle_weight * angle
