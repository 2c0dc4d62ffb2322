"""Checks of two tensors' shapes. Without them arithmetic would silently broadcast."""

from __future__ import annotations

from torch import Tensor

from mdistiller.registry import InputError


def require_one_shape(name: str, a: Tensor, b: Tensor) -> None:
    """Check that two tensors have the same shape.

    Args:
        name: the calling function, for the message.
        a: any shape.
        b: the shape of ``a``.

    Raises:
        InputError: the shapes differ.
    """
    if a.shape != b.shape:
        raise InputError(f"{name} takes two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def require_same_images(name: str, a: Tensor, b: Tensor) -> None:
    """Check that two tensors have the same number of rows, one for each image.

    Args:
        name: the calling function, for the message.
        a: ``(B, ...)``.
        b: ``(B, ...)``.

    Raises:
        InputError: the numbers differ.
    """
    if a.shape[:1] != b.shape[:1]:
        raise InputError(f"{name} takes as many rows of both, got {tuple(a.shape)} and {tuple(b.shape)}")


def require_same_width(name: str, map_s: Tensor, map_t: Tensor) -> None:
    """Check that two maps have the same numbers of images and of channels.

    Args:
        name: the calling function, for the message.
        map_s: ``(B, C, H, W)``.
        map_t: ``(B, C, H', W')``.

    Raises:
        InputError: a number differs.
    """
    if map_s.shape[:2] != map_t.shape[:2]:
        raise InputError(
            f"{name} takes maps of as many images and channels, got {tuple(map_s.shape)} and {tuple(map_t.shape)}"
        )
