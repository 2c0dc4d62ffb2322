"""NST's loss, loop by loop, from arXiv:1707.01219: squared mean discrepancy with the kernel (x . y)^2."""

from __future__ import annotations

from typing import Any

from .complex_step import dot, flat, mean, unit


def kernel_mean(a: Any, b: Any) -> Any:
    """Of two sets of samples."""
    return mean([dot(x, y) ** 2 for x in a for y in b])


def nst_loss(f_s: Any, f_t: Any) -> Any:
    """Maps (B, C_s, H, W) and (B, C_t, H, W): a sample is a channel's positions at length 1; mean over the images."""
    losses = []
    for image_s, image_t in zip(f_s, f_t, strict=True):
        s, t = ([unit(flat(channel)) for channel in image] for image in (image_s, image_t))
        losses.append(kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t))
    return mean(losses)
