"""VID's loss, loop by loop, from arXiv:1904.05835, without the Gaussian's constant."""

from __future__ import annotations

from typing import Any

from .complex_step import exp, flat, log, mean


def vid_loss(means: Any, log_scale: Any, f_t: Any, eps: float) -> Any:
    """Predicted means and the teacher's maps (B, C, H, W), (C,) for the variances log(1 + exp(x)) + eps."""
    losses = []
    for image_m, image_t in zip(means, f_t, strict=True):
        for channel_m, channel_t, scale in zip(image_m, image_t, log_scale, strict=True):
            variance = log(1 + exp(scale)) + eps
            for m, t in zip(flat(channel_m), flat(channel_t), strict=True):
                losses.append(((m - t) ** 2 / variance + log(variance)) / 2)
    return mean(losses)
