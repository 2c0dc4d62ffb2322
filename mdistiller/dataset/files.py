"""Images that lie in files: a view begins by decoding them, in the training views cropped at once.

The crop is torchvision's ``RandomResizedCrop`` with draws that follow from seed, epoch and image.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as torchvision

from mdistiller.registry import InputError

from .images import Images, as_images
from .views import Draws

ATTEMPTS = 10


@dataclass(frozen=True)
class InFiles:
    """Images in files of any size, decoded on the CPU each time that they are used.

    Args:
        paths: of the N images.
        side: pixels a side of the images that views give.
        advice: what to do about an image that cannot be read, for the message.
    """

    paths: Sequence[str]
    side: int
    advice: str = "replace or delete the file"
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

    def pixels(self) -> Tensor:
        return _middles(self)

    def fingerprint(self) -> int:
        """Of names, folders and sizes of the files: reading a million images would take hours."""
        checksum = self.side
        for path in map(Path, self.paths):
            checksum = zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name} {path.stat().st_size}"), checksum)
        return checksum

    def pictures(self) -> Iterator[Image.Image]:
        """Each image in its own size, three channels.

        Raises:
            InputError: a file that cannot be read; names it.
        """
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    yield image.convert("RGB")
            except Exception as error:  # Pillow's decoders raise what they like
                raise InputError(f"cannot read the image {path}: {error}; {self.advice}") from None


def readable(images: InFiles) -> Tensor:
    """``(N,)`` bool: which images can be decoded. Every file is read once, in threads."""

    def try_one(position: int) -> bool:
        try:
            for _ in images.take(torch.tensor([position])).pictures():
                return True
        except InputError:
            pass
        return False

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
        images, found = as_images(images), []
        height, width = images.size
        numbers = torch.stack([rng.uniform(slot) for slot in range(self.slots)], 1).tolist()
        for picture, drawn in zip(images.pictures(), numbers, strict=True):
            left, top, wide, high = self.window(picture.width, picture.height, drawn)
            window = picture.crop((left, top, left + wide, top + high))
            found.append(window.resize((width, height), Image.Resampling.BILINEAR))
        return _stacked(found, images.device)

    def window(self, width: int, height: int, drawn: list[float]) -> tuple[int, int, int, int]:
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


def _middles(images: Images) -> Tensor:
    scaled = (torchvision.resize(picture, round(min(images.size) * 8 / 7)) for picture in images.pictures())
    return _stacked([torchvision.center_crop(picture, list(images.size)) for picture in scaled], images.device)


def _stacked(pictures: Iterable[Image.Image], device: torch.device) -> Tensor:
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    return torch.stack(pixels).to(device)
