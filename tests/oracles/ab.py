"""AB's loss, loop by loop, from arXiv:1811.03233, with the constants of the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, value


def single_stage_ab_loss(f_s: Any, f_t: Any, margin: float = 1.0) -> Any:
    """Maps (B, C, H, W)."""
    total = 0.0
    for s, t in zip(flat(f_s), flat(f_t), strict=True):
        if value(t) > 0 and value(s) <= margin:
            total = total + (s - margin) ** 2
        elif value(t) <= 0 and value(s) > -margin:
            total = total + (s + margin) ** 2
    return 3 / 1000 * total / len(f_s)


def ab_loss(g_s: Any, g_t: Any, margin: float = 1.0) -> Any:
    stages = len(g_s)
    return sum(
        2.0 ** (i - stages) * single_stage_ab_loss(f_s, f_t, margin)
        for i, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True), 1)
    )
