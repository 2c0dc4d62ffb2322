"""KD's loss, loop by loop, from arXiv:1503.02531, Sec. 2.

B images, K classes; arguments are nested lists of numbers.
"""

from __future__ import annotations

from typing import Any

from .complex_step import kl_divergence, log_softmax, mean, sqrt


def standardised(row: Any) -> list[Any]:
    """LSKD's (arXiv:2403.01427): one image's logits less their mean, over their unbiased deviation."""
    centre = mean(row)
    deviation = sqrt(sum((z - centre) ** 2 for z in row) / (len(row) - 1))
    return [(z - centre) / (deviation + 1e-7) for z in row]


def kd_loss(logits_s: Any, logits_t: Any, temperature: Any, logit_stand: bool = False) -> Any:
    """T^2 KL(teacher || student) of the softened classes, ``(B, K)`` twice; mean over the images."""
    if logit_stand:
        logits_s, logits_t = ([standardised(row) for row in logits] for logits in (logits_s, logits_t))
    rows = zip(logits_s, logits_t, strict=True)
    divergences = [kl_divergence(*(log_softmax([z / temperature for z in row]) for row in (t, s))) for s, t in rows]
    return temperature**2 * mean(divergences)
