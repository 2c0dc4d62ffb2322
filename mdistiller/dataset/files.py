"""Images that lie in files: a view begins by decoding them, in the training views cropped at once.

The crop is torchvision's ``RandomResizedCrop`` with draws that follow from seed, epoch and image.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mdistiller.registry import InputError

from .decode import REDUCTIONS, Cut, Encoded, cut_views
from .images import Images, as_images
from .views import Draws

ATTEMPTS = 10
LARGER = 8 / 7  # the shorter side of a test image, before its middle is cropped: 256 for 224


@dataclass(frozen=True)
class InFiles:
    """Images in files of any size, decoded on the CPU each time that they are used.

    Args:
        paths: of the N images.
        side: pixels a side of the images that views give.
        advice: what to do about an image that cannot be read, for the message.
        photographs: turn images as their EXIF says, and decode large JPEGs at a reduced size.
    """

    paths: Sequence[str]
    side: int
    advice: str = "replace or delete the file"
    photographs: bool = False
    in_files = True
    device = torch.device("cpu")

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def names(self) -> Sequence[str]:
        """A name of each image, for messages and splits."""
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, positions: Tensor) -> InFiles:
        return replace(self, paths=[self.paths[i] for i in positions.tolist()])

    def to(self, device: torch.device) -> InFiles:
        return self

    def read(self, position: int) -> bytes:
        """The file's content."""
        with open(self.paths[position], "rb") as file:
            return file.read()

    def fingerprint(self) -> int:
        """Of names, folders and sizes of the files: reading a million images would take hours."""
        checksum = self.side
        for path in map(Path, self.paths):
            checksum = zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name} {path.stat().st_size}"), checksum)
        return checksum

    def pixels(self) -> Tensor:
        return _middles(self)

    def pictures(self) -> Iterator[Image.Image]:
        """Each image in its own size, three channels.

        Raises:
            InputError: a file that cannot be read; names it.
        """
        found: list[Tensor] = []
        for position in range(len(self)):
            self.take(torch.tensor([position])).use_each(lambda _, picture: found.append(picture.pixels()))
            yield Image.fromarray(found.pop().permute(1, 2, 0).numpy())

    def use_each(self, use: Callable[[int, Encoded], None]) -> None:
        """Call ``use(position, picture)`` for each image.

        Raises:
            InputError: a file that cannot be read; names it.
        """
        for position in range(len(self)):
            try:
                use(position, Encoded(self.read(position), self.photographs))
            except Exception as error:  # Pillow's decoders raise what they like
                raise InputError(f"cannot read the image {self.names[position]}: {error}; {self.advice}") from None


def readable(images: InFiles) -> Tensor:
    """``(N,)`` bool: which images can be decoded. Every file is read once, in threads."""

    def try_one(position: int) -> bool:
        try:
            one = replace(images.take(torch.tensor([position])), photographs=True)
            one.use_each(lambda _, picture: picture.pixels(REDUCTIONS[0]))
        except InputError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(try_one, range(len(images)))), dtype=torch.bool)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and proportions, scaled to the size of the images wanted (bilinear, antialiased).

    Its area is 8 % to all of the image's, its width by its height 3/4 to 4/3, uniform in the logarithm. Of ten draws
    the first that fits is taken; where none does, the middle of the image with proportions within these bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    slots = 2 * ATTEMPTS + 2  # area and proportions of each attempt, then row and column
    takes_images = True

    def __call__(self, images: Images | Tensor, rng: Draws) -> Tensor:
        return cut_views(as_images(images), [(self, rng)])[0]

    def cut(self, width: int, height: int, size: tuple[int, int], drawn: Sequence[float]) -> Cut:
        return Cut(*self.window(width, height, drawn), size)

    def window(self, width: int, height: int, drawn: Sequence[float]) -> tuple[int, int, int, int]:
        """Left, top, width and height in an image of that size, from ``slots`` numbers in [0, 1)."""
        low, high = (math.log(ratio) for ratio in self.ratio)
        *_, row, column = drawn
        for area, proportion in zip(drawn[0:-2:2], drawn[1:-2:2], strict=True):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            proportion = math.exp(low + (high - low) * proportion)
            w, h = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
            if 0 < w <= width and 0 < h <= height:
                return int(column * (width - w + 1)), int(row * (height - h + 1)), w, h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class ResizeAndCentreCrop:
    """Scale the shorter side to 8/7 of the wanted size (256 for 224), then crop the centre."""

    slots = 0
    takes_images = True

    def __call__(self, images: Images | Tensor, rng: Draws) -> Tensor:
        return _middles(as_images(images))

    def cut(self, width: int, height: int, size: tuple[int, int], drawn: Sequence[float]) -> Cut:
        shorter = round(min(size) * LARGER)
        scaled = tuple(int(shorter * side / min(width, height)) for side in (height, width))
        offset = tuple(round((side - wanted) / 2) for side, wanted in zip(scaled, size, strict=True))
        return Cut(0, 0, width, height, scaled, offset)


@dataclass(frozen=True)
class Whole:
    """The whole image, scaled to the wanted size."""

    slots = 0
    takes_images = True

    def __call__(self, images: Images | Tensor, rng: Draws) -> Tensor:
        return cut_views(as_images(images), [(self, rng)])[0]

    def cut(self, width: int, height: int, size: tuple[int, int], drawn: Sequence[float]) -> Cut:
        return Cut(0, 0, width, height, size)


def _middles(images: Images) -> Tensor:
    return cut_views(images, [(ResizeAndCentreCrop(), None)])[0]
