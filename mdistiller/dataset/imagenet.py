"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation photographs in 1000 classes, which serve as test.

Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge. IJCV 2015. https://www.image-net.org. The images
must be fetched there by hand; in ``<root>/imagenet/train`` and ``<root>/imagenet/val`` lies one folder for each class,
as torchvision's ``ImageFolder`` reads them.

They do not fit into memory, so they stay files: a batch is decoded when it is asked for, in the training views cropped
at once. The crop is torchvision's ``RandomResizedCrop`` with draws that follow from seed, epoch and image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as torchvision

from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset
from .randaugment import RandAugment
from .views import Cutout, Draws, HorizontalFlip, View, rotations

FOLDER = "imagenet"
ATTEMPTS = 10


@dataclass(frozen=True)
class ImageFiles:
    """Images that lie in files, in place of a tensor ``(N, 3, H, W)``; a view begins by decoding them.

    Args:
        paths: of the N images.
        size: pixels a side that views give.
    """

    paths: list[str]
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, positions: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in positions.tolist()], self.size)

    def index_select(self, dim: int, positions: Tensor) -> ImageFiles:
        return self[positions]

    def to(self, device: torch.device) -> ImageFiles:
        """Itself: files are decoded on the CPU."""
        return self

    def pictures(self) -> Iterator[Image.Image]:
        """Each image in its own size, three channels.

        Raises:
            InputError: a file that cannot be read; names it.
        """
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    yield image.convert("RGB")
            except OSError as error:
                raise InputError(f"cannot read the image {path}: {error}; fetch it again or delete it") from None


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and proportions, scaled to the size of the images wanted (bilinear, antialiased).

    Its area is 8 % to all of the image's, its width by its height 3/4 to 4/3, uniform in the logarithm. Of ten draws
    the first that fits is taken; where none does, the middle of the image with proportions within these bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    slots = 2 * ATTEMPTS + 2  # area and proportions of each attempt, then row and column

    def __call__(self, images: ImageFiles | Tensor, rng: Draws) -> Tensor:
        found = []
        numbers = torch.stack([rng.uniform(slot) for slot in range(self.slots)], 1).tolist()
        for picture, drawn in zip(_pictures(images), numbers, strict=True):
            left, top, width, height = self.window(picture.width, picture.height, drawn)
            box = (left, top, left + width, top + height)
            found.append(_pixels(picture.crop(box).resize(_size(images), Image.Resampling.BILINEAR)))
        return _stacked(found, images)

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
    """The shorter side scaled to 8/7 of the size wanted (256 for 224), of which the middle is taken."""

    slots = 0

    def __call__(self, images: ImageFiles | Tensor, rng: Draws) -> Tensor:
        size = _size(images)[0]
        scaled = (torchvision.resize(picture, round(size * 8 / 7)) for picture in _pictures(images))
        return _stacked([_pixels(torchvision.center_crop(picture, size)) for picture in scaled], images)


def _pictures(images: ImageFiles | Tensor) -> Iterator[Image.Image]:
    if isinstance(images, ImageFiles):
        return images.pictures()
    return (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu())


def _size(images: ImageFiles | Tensor) -> tuple[int, int]:
    return (images.size, images.size) if isinstance(images, ImageFiles) else (images.shape[3], images.shape[2])


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _stacked(found: list[Tensor], images: ImageFiles | Tensor) -> Tensor:
    return torch.stack(found).to(images.device if isinstance(images, Tensor) else "cpu")


@register_dataset("imagenet")
class ImageNet(DataSet):
    """Views as in mdistiller: ``weak`` is a random crop and flip; to test, the middle."""

    num_classes = 1000
    image_size = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    model_family = "imagenet"
    in_files = True
    views: ClassVar[dict[str, View]] = {
        "plain": (ResizeAndCentreCrop(),),
        "weak": (RandomResizedCrop(), HorizontalFlip()),
        "strong": (RandomResizedCrop(), HorizontalFlip(), RandAugment(n=2), Cutout()),
        **rotations((RandomResizedCrop(), HorizontalFlip())),
        "test": (ResizeAndCentreCrop(),),
    }

    @classmethod
    def load(cls, root: Path, image_size: int, download: bool) -> tuple[Split, Split]:
        return tuple(cls._read(root / FOLDER / name, image_size) for name in ("train", "val"))

    @classmethod
    def _read(cls, folder: Path, size: int) -> Split:
        wanted = (
            f"ImageNet must be fetched by hand (https://www.image-net.org), and {folder} must hold one folder for each "
            f"of its {cls.num_classes} classes; DATASET.ROOT names the folder that holds {FOLDER}"
        )
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: {wanted}")
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise InputError(f"{error}: {wanted}") from None
        if len(found.classes) != cls.num_classes:
            raise InputError(f"{folder} holds {len(found.classes)} folders: {wanted}")
        paths, labels = zip(*found.samples, strict=True)
        return Split(ImageFiles(list(paths), size), torch.tensor(labels))
