"""Feature maps of two networks side by side."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


def pool_to_common(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width of the two, by adaptive average pooling.

    Args:
        map_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        map_t: ``(B, C_t, H_t, W_t)``; gradient flows.

    Returns:
        ``(B, C_s, H, W)`` and ``(B, C_t, H, W)`` in float32 or better; a map that has this size already is not pooled.
    """
    size = tuple(min(a, b) for a, b in zip(map_s.shape[2:], map_t.shape[2:], strict=True))
    map_s, map_t = at_least_float32(map_s), at_least_float32(map_t)
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (map_s, map_t))
