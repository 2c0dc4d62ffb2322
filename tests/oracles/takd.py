"""TAKD's loss, loop by loop, from arXiv:1902.03393 and the authors' code."""

from __future__ import annotations

from typing import Any

from .crld import kd


def takd_loss(logits_s: Any, logits_t: Any, temperature: float, elements: bool) -> Any:
    total = sum(kd(s, t, temperature) for s, t in zip(logits_s, logits_t, strict=True))
    return total / (len(logits_s) * (len(logits_s[0]) if elements else 1))
