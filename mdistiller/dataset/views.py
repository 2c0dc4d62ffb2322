"""Views: how an image is augmented, as data.

A view is a tuple of operations, ``(RandomCrop(), HorizontalFlip())``, and the empty tuple is the image
as it is. An operation takes the whole batch, ``operation(images, rng) -> images``: ``images`` is
``(B, C, H, W)`` uint8 on any device and stays untouched; ``rng`` gives ``(B,)`` random numbers by slot
(:class:`Draws`). The operation may use the slots ``0 .. operation.slots - 1``. A first operation with
``takes_images = True`` is given the :class:`~mdistiller.dataset.images.Images` instead, which may differ in size, and
makes such a batch of them.

The numbers an image gets depend on the seed, the epoch, its index and the view's *name*, nothing else:
an image looks the same in any batch, with any number of workers, on any device, and whether its view is
asked for alone or beside others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.functional import draws

from .decode import cut_views
from .images import Images, as_images

Operation = Callable[[Tensor, "Draws"], Tensor]
View = tuple[Operation, ...]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of a batch.

    Args:
        state: ``(B,)`` int64, one hash per image.
        first: where slot 0 lies; each operation of a view has its own stretch.
    """

    state: Tensor
    first: int = 0

    @classmethod
    def of_view(cls, name: str, seed: int, epoch: int, index: Tensor) -> Draws:
        """``index``: ``(B,)`` sample indices, on the device where the numbers are wanted."""
        return cls(draws.hash_keys(seed, name_key(name), epoch, index))

    def uniform(self, slot: int) -> Tensor:
        """``(B,)`` float32 in [0, 1)."""
        return draws.uniform(self.first + slot, start=self.state)

    def integers(self, slot: int, low: int, high: int) -> Tensor:
        """``(B,)`` int64 in ``low .. high - 1``."""
        return draws.integers(low, high, self.first + slot, start=self.state)

    def skip(self, slots: int) -> Draws:
        return replace(self, first=self.first + slots)


def name_key(name: str) -> int:
    """A name as a key for draws; ``hash`` would differ from process to process."""
    return zlib.crc32(name.encode())


def apply_view(view: View, images: Images | Tensor, rng: Draws) -> Tensor:
    """The batch after all operations of ``view``, uint8."""
    images = as_images(images)
    if not (view and getattr(view[0], "takes_images", False)):
        images = images.pixels()
    for operation in view:
        images = operation(images, rng)
        rng = rng.skip(operation.slots)
    return images


def apply_views(views: Sequence[tuple[View, Draws]], images: Images | Tensor) -> list[Tensor]:
    """The batches of several views with their draws; what begins by taking a window of each picture, see
    :class:`~mdistiller.dataset.decode.Cutter`, decodes each picture once for all."""
    images = as_images(images)
    cutting = [(view[0], rng) for view, rng in views if view and hasattr(view[0], "cut")]
    windows = iter(cut_views(images, cutting) if cutting else ())
    return [
        apply_view(view[1:], next(windows), rng.skip(view[0].slots))
        if view and hasattr(view[0], "cut")
        else apply_view(view, images, rng)
        for view, rng in views
    ]


def is_random(view: View) -> bool:
    """Whether a view's images differ from epoch to epoch: an operation draws numbers."""
    return any(operation.slots for operation in view)


def normalize(
    images: Tensor, mean: Tensor, std: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """``(x / 255 - mean) / std`` in float32 and the layout given; ``mean`` and ``std`` are ``(C, 1, 1)``."""
    white = torch.full_like(mean, 255)  # CUDA divides by a plain number by multiplying with its reciprocal
    return images.to(torch.float32, memory_format=layout).div_(white).sub_(mean).div_(std)


@dataclass(frozen=True)
class RandomCrop:
    """A window of the image's own size from the image with a black border around it.

    Args:
        padding: width of the border in pixels; None: an eighth of the image's height (4 at 32).
    """

    padding: int | None = None
    slots = 2  # top, left

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        height, width = images.shape[2:]
        border = height // 8 if self.padding is None else self.padding
        padded = F.pad(images, (border, border, border, border))
        top = rng.integers(0, 0, 2 * border + 1)[:, None] + torch.arange(height, device=images.device)
        left = rng.integers(1, 0, 2 * border + 1)[:, None] + torch.arange(width, device=images.device)
        pixel = top[:, :, None] * padded.shape[3] + left[:, None, :]
        return take_pixels(padded, pixel)


@dataclass(frozen=True)
class HorizontalFlip:
    """Left and right swapped with probability ``p``."""

    p: float = 0.5
    slots = 1

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        flipped = rng.uniform(0) < self.p
        return torch.where(flipped[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class Rotate90:
    """A turn of ``k`` quarters counter-clockwise; images must be square where ``k`` is odd."""

    k: int
    slots = 0

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        return images.rot90(self.k, (2, 3))


def rotations(view: View) -> dict[str, View]:
    """``rot90``, ``rot180`` and ``rot270``: the images of ``view``, each view with draws of its own, then turned."""
    return {f"rot{90 * k}": (*view, Rotate90(k)) for k in (1, 2, 3)}


@dataclass(frozen=True)
class Cutout:
    """A square of random size and place painted over, as TorchSSL's code draws it.

    Its side is uniform in 0 .. ``max_ratio`` of the image's width, its centre uniform in the image. At the
    top and left border the square is moved inside, at the bottom and right border it is cut off, and the
    pixels of both ends are painted, as PIL does: a side of 5.3 paints 6 or 7 pixels.

    Args:
        max_ratio: 0 .. 1.
        color: grey levels 0 .. 255 of the channels.
    """

    max_ratio: float = 0.5
    color: tuple[int, ...] = (125, 123, 114)
    slots = 3  # side, centre's column, centre's row

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        height, width = images.shape[2:]
        side = rng.uniform(0).double() * self.max_ratio * width
        inside = self._span(rng.uniform(2), side, height)[:, :, None]
        inside = inside & self._span(rng.uniform(1), side, width)[:, None, :]
        color = torch.stack([images.new_full((1, 1), level) for level in self.color])  # new_tensor would wait for a GPU
        return torch.where(inside[:, None], color, images)

    @staticmethod
    def _span(centre: Tensor, side: Tensor, size: int) -> Tensor:
        """Which of the ``size`` rows or columns are painted, ``(B, size)`` bool."""
        start = (centre.double() * size - side / 2).clamp(min=0).floor()
        position = torch.arange(size, device=side.device)
        inside = (position >= start[:, None]) & (position <= (start + side)[:, None])
        return inside & (side > 0)[:, None]


def take_pixels(images: Tensor, pixel: Tensor) -> Tensor:
    """``out[b, c, y, x] = images[b, c].flatten()[pixel[b, y, x]]``; ``pixel`` is ``(B, H', W')`` int64."""
    batch, channels = images.shape[:2]
    source = pixel.flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view(batch, channels, *pixel.shape[1:])
