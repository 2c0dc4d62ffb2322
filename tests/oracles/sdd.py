"""SDD's loss, loop by loop, from arXiv:2403.13512, on top of KD's oracle for one row."""

from __future__ import annotations

from typing import Any

from .complex_step import kl_divergence, log_softmax, value


def sdd_kd_loss(logits_s: Any, logits_t: Any, target: Any, temperature: float) -> Any:
    """Logits (B, K, N) of regions, the whole image first; class numbers (B,)."""
    total, count = 0.0, 0
    for of_s, of_t, label in zip(logits_s, logits_t, target, strict=True):
        regions = list(zip(zip(*of_s, strict=True), zip(*of_t, strict=True), strict=True))
        right = [max(range(len(t)), key=lambda k, t=t: value(t[k])) == label for _, t in regions]
        for (s, t), correct in zip(regions, right, strict=True):
            log_p_s, log_p_t = (log_softmax([z / temperature for z in row]) for row in (s, t))
            weight = 2 if correct != right[0] else 1
            total, count = total + weight * temperature**2 * kl_divergence(log_p_t, log_p_s), count + 1
    return total / count
