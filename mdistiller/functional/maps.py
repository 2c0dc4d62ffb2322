"""Feature maps: means over positions, and one size for the maps of two networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32
from .shapes import require_same_images


def same_size(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width, by adaptive average pooling.

    Args:
        map_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        map_t: ``(B, C_t, H_t, W_t)``; gradient flows.

    Returns:
        ``(B, C_s, H, W)`` and ``(B, C_t, H, W)``. A map that already has this size is returned unchanged.

    Raises:
        InputError: the maps have different numbers of images.
    """
    require_same_images("same_size", map_s, map_t)
    size = tuple(min(a, b) for a, b in zip(map_s.shape[2:], map_t.shape[2:], strict=True))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (map_s, map_t))


def pool_to_common(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`same_size` of maps in float32 or better."""
    return same_size(at_least_float32(map_s), at_least_float32(map_t))


def channel_mean_square(maps: Tensor) -> Tensor:
    """``maps.square().mean((0, 2, 3))``: the mean of the squares over images and positions.

    The gradient keeps the maps' memory layout; torch's gradient of this expression does not. For channels_last maps
    every earlier layer would convert its gradient, which takes longer than the convolutions do.

    Args:
        maps: ``(B, C, H, W)`` in float32 or better; gradient flows, first derivative only.

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
    """``maps``, with a gradient in the memory layout of ``maps``.

    A loss that flattens maps returns its gradient in the contiguous layout. In a channels_last network every earlier
    layer would then mix two layouts and be several times slower.

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
    """``at_least_float32(maps).mean((2, 3))``: the mean over height and width.

    torch's backward pass would write a float32 map of equal numbers and convert the map. This one converts the gradient
    first and expands it without a copy.

    Args:
        maps: ``(B, C, H, W)``; gradient flows, first derivative only.

    Returns:
        ``(B, C)``, float32 for maps in half precision.
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
