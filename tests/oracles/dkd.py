"""DKD's loss, loop by loop, from arXiv:2203.08679, Eq. 3 to 7."""

from __future__ import annotations

from typing import Any

from .complex_step import log, mean, softmax


def dkd_loss(logits_s: Any, logits_t: Any, target: Any, alpha: float, beta: float, temperature: float) -> Any:
    """``alpha`` TCKD + ``beta`` NCKD, times T^2; logits (B, K), class numbers (B,)."""
    losses = []
    for row_s, row_t, label in zip(logits_s, logits_t, target, strict=True):
        p_s, p_t = (softmax([z / temperature for z in row]) for row in (row_s, row_t))
        others = [k for k in range(len(p_s)) if k != label]
        rest_s, rest_t = (sum(p[k] for k in others) for p in (p_s, p_t))
        tckd = p_t[label] * log(p_t[label] / p_s[label]) + rest_t * log(rest_t / rest_s)
        nckd = sum(p_t[k] / rest_t * log((p_t[k] / rest_t) / (p_s[k] / rest_s)) for k in others)
        losses.append(alpha * tckd + beta * nckd)
    return temperature**2 * mean(losses)
