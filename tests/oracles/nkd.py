"""NKD's loss, loop by loop, from arXiv:2303.13005."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, exp, log_softmax, mean


def nkd_loss(logits_s: Any, logits_t: Any, target: Any, gamma: float, temperature: float, whole: bool = False) -> Any:
    """Logits (B, K), class numbers (B,); ``whole`` leaves the target among the others."""
    losses = []
    for row_s, row_t, label in zip(logits_s, constant(logits_t), target, strict=True):
        label = int(label)
        of_target = exp(log_softmax(row_t)[label]) * log_softmax(row_s)[label]
        others = [k for k in range(len(row_s)) if whole or k != label]
        log_q_s, log_q_t = (log_softmax([row[k] / temperature for k in others]) for row in (row_s, row_t))
        rest = sum(exp(t) * s for s, t in zip(log_q_s, log_q_t, strict=True))
        losses.append(-of_target - gamma * temperature**2 * rest)
    return mean(losses)
