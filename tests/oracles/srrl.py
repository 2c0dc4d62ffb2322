"""SRRL's two losses, loop by loop, as the authors' code for ImageNet has them."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, flat, mean


def mean_square(ours: Any, theirs: Any) -> Any:
    return mean([(s - t) ** 2 for s, t in zip(flat(ours), flat(constant(theirs)), strict=True)])


def srrl_losses(pooled_s: Any, pooled_t: Any, logits_s: Any, logits_t: Any) -> tuple[Any, Any]:
    """Pooled features (B, D) and logits (B, K) of both networks."""
    return mean_square(pooled_s, pooled_t), mean_square(logits_s, logits_t)
