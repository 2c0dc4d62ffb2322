"""OFD's loss and margins, loop by loop, from arXiv:1904.01866, Eq. 2 and 3."""

from __future__ import annotations

import math
from typing import Any

from .complex_step import flat, value


def ofd_loss(f_s: Any, f_t: Any, margin: Any) -> Any:
    """Maps (B, C, H, W), the student's behind the connector; ``margin`` (C,); sum over a map, mean over images."""
    total = 0.0
    for image_s, image_t in zip(f_s, f_t, strict=True):
        for channel_s, channel_t, least in zip(image_s, image_t, margin, strict=True):
            for s, t in zip(flat(channel_s), flat(channel_t), strict=True):
                wanted = t if value(t) > value(least) else least
                if value(s) > value(wanted) or value(wanted) > 0:
                    total = total + (s - wanted) ** 2
    return total / len(f_s)


def margin(weight: float, bias: float) -> float:
    """What a normal number of mean ``bias`` and deviation ``|weight|`` is on average where it is negative."""
    deviation = abs(weight)
    share = math.erfc(bias / deviation / math.sqrt(2)) / 2
    if share <= 0.001:
        return -3 * deviation
    return bias - deviation * math.exp(-((bias / deviation) ** 2) / 2) / math.sqrt(2 * math.pi) / share
