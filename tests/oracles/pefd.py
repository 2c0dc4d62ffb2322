"""PEFD's loss, loop by loop, from arXiv:2210.15274."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, mean, unit, value


def relu(x: Any) -> Any:
    return x if value(x) > 0 else 0.0


def pefd_loss(projections: Any, h_t: Any) -> Any:
    """(P, B, D) before the ReLU, and (B, D)."""
    losses = []
    for number, teacher in enumerate(h_t):
        entries = zip(*(projection[number] for projection in projections), strict=True)
        losses.append(1 - dot(unit([mean([relu(x) for x in entry]) for entry in entries]), unit(teacher)))
    return mean(losses)
