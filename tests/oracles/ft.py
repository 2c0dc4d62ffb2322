"""FT's loss, loop by loop, as RepDistiller has it, for codes of one size."""

from __future__ import annotations

from typing import Any

from .complex_step import absolute, constant, flat, mean, unit


def factors(code: Any) -> list[Any]:
    """(B, C, H, W): each image's factor, flattened."""
    rows = []
    for image in code:
        channels = [flat(channel) for channel in image]
        rows += unit([mean([x * x for x in position]) for position in zip(*channels, strict=True)])
    return rows


def ft_loss(code_s: Any, code_t: Any, p: int = 1) -> Any:
    return mean([absolute(s - t) ** p for s, t in zip(factors(code_s), factors(constant(code_t)), strict=True)])
