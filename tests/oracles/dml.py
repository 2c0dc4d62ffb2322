"""DML's losses, loop by loop, from arXiv:1706.00384."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, mean
from .crld import kd


def dml_losses(*logits: Any) -> tuple[Any, ...]:
    """(B, K) of each network; the others' predictions are constants."""
    losses = []
    for i, own in enumerate(logits):
        others = [constant(other) for j, other in enumerate(logits) if j != i]
        terms = [kd(row, row_other, 1.0) for other in others for row, row_other in zip(own, other, strict=True)]
        losses.append(mean(terms))
    return tuple(losses)
