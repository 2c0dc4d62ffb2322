"""HSAKD's losses, loop by loop, from arXiv:2107.13715 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, kl_divergence, log_softmax, mean


def branch_loss(branches_s: Any, branches_t: Any, temperature: float) -> Any:
    """Logits (B, K) of each branch."""
    total = 0.0
    for rows_s, rows_t in zip(branches_s, constant(branches_t), strict=True):
        terms = []
        for rows in zip(rows_s, rows_t, strict=True):
            log_p_s, log_p_t = (log_softmax([z / temperature for z in row]) for row in rows)
            terms.append(temperature**2 * kl_divergence(log_p_t, log_p_s))
        total = total + mean(terms)
    return total
