"""TTM's and WTTM's losses, loop by loop, from arXiv:2402.11148."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, log, mean, softmax


def divergences(logits_s: Any, logits_t: Any, power: float) -> list[tuple[Any, Any]]:
    """Each image's sum of ``p_t^l`` and its KL divergence."""
    found = []
    for row_s, row_t in zip(logits_s, constant(logits_t), strict=True):
        p_s, raised = softmax(row_s), [p**power for p in softmax(row_t)]
        transformed = [p / sum(raised) for p in raised]
        found.append((sum(raised), sum(q * log(q / p) for q, p in zip(transformed, p_s, strict=True))))
    return found


def ttm_loss(logits_s: Any, logits_t: Any, power: float) -> Any:
    return mean([each for _, each in divergences(logits_s, logits_t, power)])


def wttm_loss(logits_s: Any, logits_t: Any, power: float) -> Any:
    return mean([weight * each for weight, each in divergences(logits_s, logits_t, power)])
