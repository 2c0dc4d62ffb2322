"""STL-10: 5,000 training and 8,000 test photographs of 96x96 pixels in 10 classes, seen at 32x32.

Coates, Lee, Ng. An Analysis of Single-Layer Networks in Unsupervised Feature Learning. AISTATS 2011.
https://cs.stanford.edu/~acoates/stl10: the binary files, in ``<root>/stl10_binary``. The 100,000 images without labels
are not used.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset, resize_images
from .cifar100 import CIFAR100
from .views import View

FOLDER, SIDE = "stl10_binary", 96


@register_dataset("stl10")
class STL10(DataSet):
    """Views as for CIFAR-100, whose networks it is used with."""

    num_classes = 10
    image_size = 32
    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)
    model_family = "cifar"
    views: ClassVar[dict[str, View]] = CIFAR100.views
    classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

    def load(self) -> tuple[Split, Split]:
        return self._read("train"), self._read("test")

    def _read(self, name: str) -> Split:
        """Images are stored column by column, labels from 1."""
        folder = self.root / FOLDER
        try:
            images = np.fromfile(folder / f"{name}_X.bin", dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
            labels = np.fromfile(folder / f"{name}_y.bin", dtype=np.uint8)
            if not 0 < len(images) == len(labels) or labels.min() < 1 or labels.max() > self.num_classes:
                raise ValueError(f"{len(images)} images and {len(labels)} labels from 1 to {self.num_classes}")
        except (OSError, ValueError) as error:
            raise InputError(
                f"STL-10: cannot read {folder}/{name}_X.bin and {name}_y.bin: {error}; download stl10_binary.tar.gz "
                "from https://cs.stanford.edu/~acoates/stl10 and unpack it; DATASET.ROOT names the folder that holds "
                f"{FOLDER}"
            ) from error
        upright = torch.from_numpy(images).transpose(2, 3).contiguous()
        return Split(resize_images(upright, self.image_size), torch.from_numpy(labels).long() - 1)
