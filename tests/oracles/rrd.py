"""RRD's loss, loop by loop, from arXiv:2407.12073."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, log_softmax, mean, softmax


def rrd_loss(similar_s: Any, similar_t: Any, t_s: float, t_t: float) -> Any:
    losses = []
    for row_s, row_t in zip(similar_s, similar_t, strict=True):
        losses.append(-dot(softmax([x / t_t for x in row_t]), log_softmax([x / t_s for x in row_s])))
    return mean(losses)
