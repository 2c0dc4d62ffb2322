"""ITRD's losses, loop by loop, from arXiv:2112.00459 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import absolute, dot, log, mean, sqrt, unit, value


def standardised(column: Any) -> list[Any]:
    """One entry over the batch, by its unbiased deviation; a constant one is 0."""
    centred = [x - mean(column) for x in column]
    variance = sum(x * x for x in centred) / max(len(column) - 1, 1)
    return [x / sqrt(variance) for x in centred] if value(variance) > 0 else [0.0 for _ in centred]


def correlation_loss(z_s: Any, z_t: Any, alpha: float) -> Any:
    total = 0.0
    for column_s, column_t in zip(zip(*z_s, strict=True), zip(*z_t, strict=True), strict=True):
        correlation = dot(standardised(list(column_s)), standardised(list(column_t))) / len(z_s)
        total = total + absolute(correlation - 1) ** (2 * alpha)
    return log(total) / log(2.0)


def squares(gram: Any) -> Any:
    """Of the entries, divided by the trace."""
    trace = sum(gram[i][i] for i in range(len(gram)))
    return sum((x / trace) ** 2 for row in gram for x in row)


def mutual_loss(z_s: Any, z_t: Any) -> Any:
    k_s, k_t = ([[dot(a, b) for b in rows] for a in rows] for rows in ([unit(z) for z in net] for net in (z_s, z_t)))
    joint = [[s * t for s, t in zip(*rows, strict=True)] for rows in zip(k_s, k_t, strict=True)]
    return squares(k_s) - squares(joint)
