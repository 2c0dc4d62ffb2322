"""Averages over the positions of feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import at_least_float32


def spatial_mean(maps: Tensor) -> Tensor:
    """Mean over height and width, in float32 where the maps are in half precision.

    The same as ``at_least_float32(maps).mean((2, 3))``, whose backward pass would write a float32 map of equal numbers
    and convert it; here the gradient is converted first and spread without being written.

    Args:
        maps: ``(B, C, H, W)``; gradient flows, once.

    Returns:
        ``(B, C)``.
    """
    return _SpatialMean.apply(maps)


class _SpatialMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = maps.shape, maps.dtype
        return at_least_float32(maps).mean((2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        positions = ctx.shape[2] * ctx.shape[3]
        return (gradient / positions).to(ctx.dtype)[:, :, None, None].expand(ctx.shape)
