"""What a data set is: a class with facts, view recipes and a ``load`` method, found by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.registry import dataset_dict

from .views import View


@dataclass(frozen=True)
class Split:
    """Labelled images in memory.

    Args:
        images: ``(N, 3, H, W)`` uint8; grey images are repeated to three channels. Or what stands for them until a
            view decodes them: :class:`~mdistiller.dataset.imagenet.ImageFiles`.
        labels: ``(N,)`` int64, from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on ``device``; itself if it lies there."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, positions: Tensor) -> Split:
        """The images at ``positions``, in that order."""
        return Split(self.images[positions], self.labels[positions])


class DataSet:
    """Base of all data sets; its facts are class attributes, so that nothing is loaded to know them."""

    name: ClassVar[str]
    num_classes: ClassVar[int]
    image_size: ClassVar[int]  # pixels a side where DATASET.IMAGE_SIZE does not say otherwise
    mean: ClassVar[tuple[float, float, float]]  # of the training images, where white is 1
    std: ClassVar[tuple[float, float, float]]
    model_family: ClassVar[str]  # key of registry.MODEL_FAMILIES
    public_teachers: ClassVar[bool] = False  # whether the checkpoints in the model table were trained on it
    views: ClassVar[
        dict[str, View]
    ]  # "weak": what a method gets that asks for "image"; "plain": the same in each epoch; "test" where there is one
    in_files: ClassVar[bool] = False  # images are decoded batch by batch, instead of lying in memory
    defaults: ClassVar[dict[str, Any]] = {}  # options (mdistiller/options.py) of its own section, DATASET.<NAME>

    @classmethod
    def load(cls, root: Path, image_size: int, download: bool, **options: Any) -> tuple[Split, Split]:
        """Training and test images.

        Args:
            root: folder of the data, one for all data sets; those that need no files ignore it.
            image_size: pixels a side of the images returned.
            download: fetch missing files.
            options: the keys of ``defaults``, in lower case.
        Raises:
            InputError: files are missing or unreadable; says which and what to do.
        """
        raise NotImplementedError


def register_dataset(name: str) -> Callable[[type[DataSet]], type[DataSet]]:
    """Class decorator that enters a data set into ``dataset_dict`` as ``name``, for ``DATASET.TYPE``."""

    def register(cls: type[DataSet]) -> type[DataSet]:
        cls.name = name
        dataset_dict.add(name, cls)
        return cls

    return register


def resize_images(images: Tensor, size: int) -> Tensor:
    """Grey levels 0 .. 255 as uint8, resized to ``size`` x ``size``: bilinear, antialiased.

    Args:
        images: ``(N, C, H, W)``, uint8 or float.
    """
    if images.shape[2:] == (size, size) and images.dtype == torch.uint8:
        return images
    resized = images.new_empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for source, target in zip(images.split(1000), resized.split(1000), strict=True):  # bounds the float copy
        level = F.interpolate(source.float(), (size, size), mode="bilinear", antialias=True)
        target.copy_(level.round_().clamp_(0, 255))
    return resized
