"""Images of your own: one folder of images for each class.

``DATASET.ROOT`` holds ``train`` and, for the test images, ``test`` or ``val``; each of them holds the classes' folders,
as torchvision's ``ImageFolder`` reads them. The classes are the folders in ``train``, in alphabetical order.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from mdistiller.messages import warn
from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset
from .files import InFiles, RandomResizedCrop, ResizeAndCentreCrop
from .randaugment import RandAugment
from .views import Cutout, HorizontalFlip, View, rotations


@register_dataset("folder")
class Folder(DataSet):
    """Views as for ImageNet in mdistiller: ``weak`` is a random crop and flip; to test, the middle. Mean and standard
    deviation are ImageNet's.
    """

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
    sorting = "move those of each class into a folder of their own"
    below_root = ""  # the folder below DATASET.ROOT that holds the splits
    test_folders: ClassVar[tuple[str, ...]] = ("test", "val")  # the first that is there is used

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return self.class_folders(self.place / "train")

    @cached_property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def place(self) -> Path:
        return self.root / self.below_root

    def load(self) -> tuple[Split, Split]:
        found = [name for name in self.test_folders if (self.place / name).is_dir()] or self.test_folders[-1:]
        if len(found) > 1:
            warn(f"test images are read from {self.place / found[0]}; images in {self.place / found[1]} are not used")
        return self.read("train"), self.read(found[0])

    def read(self, name: str) -> Split:
        """The images of the folder called ``name``.

        Raises:
            InputError: it is missing, has a class that ``train`` has not, or a class without images.
        """
        folder = self.place / name
        found, number = self.class_folders(folder), {name: number for number, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in number]
        if unknown:
            raise InputError(
                f"{folder} holds the class {unknown[0]!r}, which {self.place / 'train'} lacks: {self.wanted(folder)}"
            )
        try:
            samples = make_dataset(str(folder), {name: number[name] for name in found}, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise InputError(f"{error}: {self.wanted(folder)}") from None
        paths, targets = zip(*samples, strict=True)
        return Split(InFiles(paths, self.image_size), torch.tensor(targets))

    def class_folders(self, folder: Path) -> tuple[str, ...]:
        """Names of the classes' folders in ``folder``, sorted.

        Raises:
            InputError: there is none.
        """
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: {self.wanted(folder)}")
        found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
        if not found:
            flat = any(entry.suffix.lower() in IMG_EXTENSIONS for entry in folder.iterdir())
            problem = f"the images lie in {folder} itself; {self.sorting}" if flat else f"{folder} holds no folder"
            raise InputError(f"{problem}: {self.wanted(folder)}")
        return found

    def wanted(self, folder: Path) -> str:
        """The layout that is expected, for messages."""
        return (
            f"{folder} must hold one folder of images for each class; DATASET.ROOT names the folder that holds train "
            "and val (or test)"
        )
