"""PKT's loss, loop by loop, from arXiv:1803.10837, with the constants of the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, log, mean, norm

EPS = 1e-7


def probabilities(embeddings: Any) -> list[list[Any]]:
    """(B, D) -> (B, B): image j as a neighbour of image i, by the kernel (cosine + 1) / 2."""
    rows = [[x / (norm(row) + EPS) for x in row] for row in embeddings]
    kernel = [[(dot(a, b) + 1) / 2 for b in rows] for a in rows]
    return [[x / sum(row) for x in row] for row in kernel]


def pkt_loss(f_s: Any, f_t: Any) -> Any:
    pairs = [
        (s, t) for rows in zip(probabilities(f_s), probabilities(f_t), strict=True) for s, t in zip(*rows, strict=True)
    ]
    return mean([t * log((t + EPS) / (s + EPS)) for s, t in pairs])
