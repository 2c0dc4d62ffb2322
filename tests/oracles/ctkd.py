"""CTKD's temperature, curriculum and loss, loop by loop, from arXiv:2211.16231 and the authors' code."""

from __future__ import annotations

import math
from typing import Any

from .complex_step import constant, exp
from .kd import kd_loss


def temperature(g: Any, t_start: float, t_end: float, reversal: float) -> Any:
    """Global-T: ``t_start + t_end sigmoid(g)``, whose slope counts ``reversal`` times."""
    forward = t_start + t_end / (1 + exp(-g))
    return constant(forward) + reversal * (forward - constant(forward))


def reversal(epoch: int, highest: float, lowest: float, loops: int) -> float:
    """Lambda: half a cosine from ``highest`` down to ``lowest``, which it has from epoch ``loops`` on."""
    if epoch >= loops:
        return lowest
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * epoch / loops)) / 2


def ctkd_loss(logits_s: Any, logits_t: Any, g: Any, t_start: float, t_end: float, reversal: float) -> Any:
    return kd_loss(logits_s, logits_t, temperature(g, t_start, t_end, reversal))
