"""KD's loss, loop by loop, from arXiv:1503.02531, Sec. 2.

B images, K classes; arguments are nested lists of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .complex_step import kl_divergence, log_softmax, mean


def kd_loss(logits_s: Sequence[Sequence[Any]], logits_t: Sequence[Sequence[Any]], temperature: Any) -> Any:
    """T^2 KL(teacher || student) of the softened classes, ``(B, K)`` twice; mean over the images."""
    rows = zip(logits_s, logits_t, strict=True)
    divergences = [kl_divergence(*(log_softmax([z / temperature for z in row]) for row in (t, s))) for s, t in rows]
    return temperature**2 * mean(divergences)
