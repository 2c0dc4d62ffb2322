"""Data sets: facts, view recipes and images with targets, found by a name and opened for a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import ismethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.registry import dataset_dict

from .images import Images, as_images
from .views import View

PerChannel = tuple[float, float, float]

AUTO, IMAGENET = "auto", "imagenet"  # in place of numbers, for DATASET.MEAN and DATASET.STD
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEASURED = 2000  # images at least that are measured, where there are so many


@dataclass(frozen=True)
class Split:
    """Images, each with its target.

    Args:
        images: N of them, in memory or in files; a tensor ``(N, 3, H, W)`` uint8 stands for images in memory.
        targets: ``(N,)`` int64, numbers of classes from 0; another task may have more for each image, ``(N, ...)``.
    """

    images: Images
    targets: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", as_images(self.images))

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        """The same on ``device``; itself if it lies there."""
        return Split(self.images.to(device), self.targets.to(device))

    def take(self, positions: Tensor) -> Split:
        """The images at ``positions``, in that order."""
        return Split(self.images.take(positions), self.targets[positions])


class DataSet:
    """Base of all data sets. An object of the class is a data set that was opened for a configuration.

    Facts that are constants are class attributes. A fact that only the files tell is a ``cached_property``, so that
    opening reads nothing. :meth:`load` reads the images; it may be a class method ``load(cls, root, image_size,
    download, **options)`` too.

    Args:
        root: ``DATASET.ROOT``, the folder with the data of all data sets.
        image_size: pixels a side of the images; 0: as the class says.
        download: fetch missing files.
        options: the values of ``defaults``, with their keys in lower case.
    """

    name: ClassVar[str]
    task: ClassVar[str] = "classification"  # key of registry.task_dict
    num_classes: int
    image_size: int  # pixels a side where DATASET.IMAGE_SIZE does not say otherwise
    mean: PerChannel  # of the training images, where white is 1
    std: PerChannel
    model_family: str  # key of registry.MODEL_FAMILIES
    public_teachers: bool = False  # whether the checkpoints in the model table were trained on it
    # "weak": what a method gets that asks for "image"; "plain": the same in each epoch; "test" where there is one
    views: dict[str, View]
    in_files: bool = False  # images are decoded batch by batch, instead of lying in memory
    given_mean: Sequence[Any] = ()  # DATASET.MEAN
    given_std: Sequence[Any] = ()  # DATASET.STD
    defaults: ClassVar[dict[str, Any]] = {}  # options (mdistiller/options.py) of its own section, DATASET.<NAME>

    def __init__(self, root: Path, image_size: int = 0, download: bool = False, **options: Any) -> None:
        self.root, self.download, self.options = root, download, options
        if image_size:
            self.image_size = image_size
        if ismethod(type(self).load):  # a class method takes the settings as arguments
            self.load = partial(type(self).load, root, self.image_size, download, **options)

    @classmethod
    def open(cls, cfg: Any) -> DataSet:
        """The data set with the settings of ``cfg.DATASET``."""
        keys = cfg.DATASET
        options = {key.lower(): keys[cls.name.upper()][key] for key in cls.defaults}
        opened = cls(Path(keys.ROOT).expanduser(), keys.IMAGE_SIZE, keys.DOWNLOAD, **options)
        opened.given_mean, opened.given_std = keys.get("MEAN", ()), keys.get("STD", ())
        return opened

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; their numbers where they have none."""
        return [str(number) for number in range(self.num_classes)]

    @cached_property
    def normalisation(self) -> tuple[PerChannel, PerChannel]:
        """Mean and standard deviation that images are normalised by: those given, or the class's own.

        Raises:
            InputError: see :meth:`load`, if they are to be measured.
        """
        given = tuple(self.given_mean), tuple(self.given_std)
        measured = _measured(self.load()[0].images) if (AUTO,) in given else (None, None)
        known = {(): (self.mean, self.std), (IMAGENET,): IMAGENET_STATISTICS, (AUTO,): measured}
        return tuple(known[one][which] if one in known else one for which, one in enumerate(given))

    def load(self) -> tuple[Split, ...]:
        """Training and test images, and those on which epochs are compared, if the data set has such.

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


def _measured(images: Images) -> tuple[PerChannel, PerChannel]:
    """Mean and standard deviation of the channels over all pixels of evenly spread images, without augmentation."""
    positions = torch.arange(len(images))[:: max(1, len(images) // MEASURED)]
    total, squares, count = torch.zeros(3, dtype=torch.double), torch.zeros(3, dtype=torch.double), 0
    for part in positions.split(50):
        level = images.take(part).pixels().double() / 255
        total, squares = total + level.sum((0, 2, 3)), squares + level.square().sum((0, 2, 3))
        count += level[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(tuple(round(value, 4) for value in part.tolist()) for part in (mean, std))


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
