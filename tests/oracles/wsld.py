"""WSLD's loss, loop by loop, from arXiv:2102.00650, with the constant of the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, exp, log_softmax, mean

EPS = 1e-7


def wsld_loss(logits_s: Any, logits_t: Any, target: Any, temperature: float) -> Any:
    """Logits (B, K), class numbers (B,)."""
    losses = []
    for row_s, row_t, label in zip(logits_s, constant(logits_t), target, strict=True):
        of_s, of_t = (-log_softmax(row)[int(label)] for row in (constant(row_s), row_t))
        log_p_s, log_p_t = (log_softmax([z / temperature for z in row]) for row in (row_s, row_t))
        soft = -sum(exp(t) * s for s, t in zip(log_p_s, log_p_t, strict=True))
        losses.append((1 - exp(-of_s / (of_t + EPS))) * soft * temperature**2)
    return mean(losses)
