"""The images of a split: a protocol of few members, and the form of it that keeps the images in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor


class Images(Protocol):
    """N images of three channels with 8 bits each.

    ``device`` is where a view makes its batches, ``size`` the height and the width of the images that a view gives;
    ``in_files`` says whether each use decodes the images anew.
    """

    in_files: ClassVar[bool]
    size: tuple[int, int]
    device: torch.device

    def __len__(self) -> int: ...

    def take(self, positions: Tensor) -> Images:
        """The images at ``positions`` ``(B,)``, in that order."""

    def to(self, device: torch.device) -> Images:
        """The same on ``device``; itself if it lies there."""

    def pixels(self) -> Tensor:
        """``(N, 3, H, W)`` uint8 of ``size``, without any draw."""

    def pictures(self) -> Iterator[Image.Image]:
        """Each image in the size that it is kept in, decoded one after the other."""

    def fingerprint(self) -> int:
        """A checksum that tells these images from others."""


@dataclass(frozen=True)
class InMemory:
    """Images as one tensor ``(N, 3, H, W)`` uint8; grey images are repeated to three channels."""

    tensor: Tensor
    in_files = False

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.tensor.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, positions: Tensor) -> InMemory:
        return InMemory(self.tensor.index_select(0, positions))

    def to(self, device: torch.device) -> InMemory:
        return InMemory(self.tensor.to(device))

    def pixels(self) -> Tensor:
        return self.tensor

    def pictures(self) -> Iterator[Image.Image]:
        return (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.tensor.cpu())

    def fingerprint(self) -> int:
        return zlib.crc32(self.tensor.cpu().contiguous().numpy())


def as_images(images: Images | Tensor) -> Images:
    """``images`` as :class:`Images`; a tensor becomes :class:`InMemory`."""
    return InMemory(images) if isinstance(images, Tensor) else images
