"""MixUp and CutMix: labels, and shares from Beta(alpha, alpha) by one uniform draw each, without rejection."""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 4096  # intervals of the table of quantiles


def class_numbers(target: Tensor) -> Tensor:
    """Class numbers ``(B,)`` of a target. Class numbers stay as they are; of shares ``(B, K)`` the largest counts."""
    return target.argmax(1) if target.ndim == 2 else target


def share_quantiles(alpha: float) -> Tensor:
    """Quantiles ``(GRID + 1,)`` of ``x^min(alpha, 1)`` at even steps, x the smaller share of Beta(alpha, alpha).

    In this power of x the density is bounded for every alpha, so linear interpolation of the table is accurate.
    """
    power = min(alpha, 1.0)
    grid = torch.linspace(0, 0.5**power, GRID + 1, dtype=torch.float64)
    x = grid ** (1 / power)
    log_density = torch.xlogy(torch.tensor(alpha - power, dtype=torch.float64), x) + (alpha - 1) * torch.log1p(-x)
    log_density = torch.where(torch.isnan(log_density), -torch.inf, log_density)
    density = (log_density - log_density.max()).exp()
    reached = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, grid)])
    wanted = torch.linspace(0, 1, GRID + 1, dtype=torch.float64) * reached[-1]
    right = torch.searchsorted(reached, wanted).clamp(1, GRID)
    step = (wanted - reached[right - 1]) / (reached[right] - reached[right - 1])
    return torch.lerp(grid[right - 1], grid[right], step.clamp(0, 1)).float()


def smaller_shares(uniform: Tensor, quantiles: Tensor, alpha: float) -> Tensor:
    """The smaller of the two shares, in [0, 0.5].

    Args:
        uniform: float32 draws in [0, 1), of any shape.
        quantiles: :func:`share_quantiles` of the same ``alpha``, on the same device.
        alpha: above 0.
    """
    place = uniform * GRID
    below = place.long()
    left, right = quantiles[below].float(), quantiles[below + 1].float()
    return torch.lerp(left, right, place - below) ** (1 / min(alpha, 1.0))


def beta_shares(uniform: Tensor, quantiles: Tensor, alpha: float) -> Tensor:
    """Draws from Beta(alpha, alpha), in [0, 1]. See :func:`smaller_shares` for the arguments."""
    smaller = smaller_shares((2 * uniform) % 1, quantiles, alpha)
    return torch.where(uniform < 0.5, smaller, 1 - smaller)
