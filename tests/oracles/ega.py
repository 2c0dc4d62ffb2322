"""EGA's loss, loop by loop, from arXiv:2211.13264."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, mean, norm, unit


def centred(vector: Any) -> list[Any]:
    return [x - mean(vector) for x in vector]


def pearson(a: Any, b: Any) -> list[list[Any]]:
    """Correlations of all pairs of rows."""
    return [[dot(unit(centred(x)), unit(centred(y))) for y in b] for x in a]


def ega_loss(f_s: Any, f_t: Any, node_weight: float, edge_weight: float) -> Any:
    images = range(len(f_s))
    between, within_s, within_t = pearson(f_t, f_s), pearson(f_s, f_s), pearson(f_t, f_t)
    nodes = [between[i][j] - (1 if i == j else 0) for i in images for j in images]
    edges = [within_s[i][j] - within_t[i][j] for i in images for j in images]
    return node_weight * norm(nodes) + edge_weight * norm(edges)
