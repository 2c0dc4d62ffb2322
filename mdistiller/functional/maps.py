"""Feature maps: their means over positions, and those of two networks side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32
from .shapes import require_same_images


def same_size(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width of the two, by adaptive average pooling.

    Args:
        map_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        map_t: ``(B, C_t, H_t, W_t)``; gradient flows.

    Returns:
        ``(B, C_s, H, W)`` and ``(B, C_t, H, W)``; a map that has this size already is returned as it is.

    Raises:
        InputError: maps of unequally many images.
    """
    require_same_images("same_size", map_s, map_t)
    size = tuple(min(a, b) for a, b in zip(map_s.shape[2:], map_t.shape[2:], strict=True))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (map_s, map_t))


def pool_to_common(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`same_size` of maps in float32 or better."""
    return same_size(at_least_float32(map_s), at_least_float32(map_t))


def channel_mean_square(maps: Tensor) -> Tensor:
    """Mean of the squares over images, height and width.

    The same as ``maps.square().mean((0, 2, 3))``, whose gradient comes without the maps' memory layout: of maps that
    are channels_last, everything behind would be converted back and forth, which takes longer than convolutions do.

    Args:
        maps: ``(B, C, H, W)`` in float32 or better; gradient flows, once.

    Returns:
        ``(C,)``.
    """
    return _ChannelMeanSquare.apply(maps)


class _ChannelMeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.save_for_backward(maps)
        return maps.square().mean((0, 2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (maps,) = ctx.saved_tensors
        return maps * (gradient * (2 * maps.shape[1] / maps.numel()))[:, None, None]


def gradient_in_layout(maps: Tensor) -> Tensor:
    """``maps``, whose gradient will lie in memory as they do.

    A loss that reads maps row by row (flattened, squared, as matrices) hands back its gradient in the plain layout. In
    a network that is channels_last, every layer behind would have to mix the two, several times slower.

    Args:
        maps: ``(B, C, H, W)``; gradient flows.
    """
    return _GradientInLayout.apply(maps)


class _GradientInLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
        return maps.view_as(maps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last) if ctx.channels_last else gradient


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
