"""Rotated copies of a batch's images."""

from __future__ import annotations

import torch
from torch import Tensor

from mdistiller.registry import InputError

QUARTERS = 4  # turns by 0, 90, 180 and 270 degrees


def rotations(image: Tensor) -> Tensor:
    """``(4 B, 3, H, H)``: the images, then all of them turned by 90 degrees, by 180, and by 270.

    Args:
        image: ``(B, 3, H, H)``.

    Raises:
        InputError: images that are not square.
    """
    if image.shape[2] != image.shape[3]:
        raise InputError(f"rotations need square images, got {tuple(image.shape[2:])}; choose another method")
    turned = torch.cat([image.rot90(quarters, (2, 3)) for quarters in range(QUARTERS)])
    return turned.contiguous(memory_format=torch.channels_last) if _is_channels_last(image) else turned


def _is_channels_last(image: Tensor) -> bool:
    return not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
