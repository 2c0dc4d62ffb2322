"""CIFAR-10: 50,000 training and 10,000 test photographs of 32x32 pixels in 10 classes.

Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009.
https://www.cs.toronto.edu/~kriz/cifar.html: the files are that page's "python version", in
``<root>/cifar-10-batches-py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset, resize_images
from .cifar100 import CIFAR100, read_split
from .views import View

FOLDER = "cifar-10-batches-py"
TRAIN, TEST = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]


@register_dataset("cifar10")
class CIFAR10(DataSet):
    """Views as for CIFAR-100."""

    num_classes = 10
    image_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    model_family = "cifar"
    views: ClassVar[dict[str, View]] = CIFAR100.views
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self) -> tuple[Split, Split]:
        return self._read(TRAIN), self._read(TEST)

    def _read(self, names: list[str]) -> Split:
        parts, folder = [], self.root / FOLDER
        for name in names:
            try:
                parts.append(read_split(folder / name, "labels", self.num_classes))
            except Exception as error:  # a damaged pickle can raise anything
                raise InputError(f"CIFAR-10: cannot read {folder / name}: {error}; {_how_to_get(folder)}") from error
        images = torch.cat([part.images.pixels() for part in parts])
        return Split(resize_images(images, self.image_size), torch.cat([part.targets for part in parts]))


def _how_to_get(folder: Path) -> str:
    return (
        "download the python version of CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it, so "
        f"that the files are in {folder}; DATASET.ROOT names the folder that holds {FOLDER}"
    )
