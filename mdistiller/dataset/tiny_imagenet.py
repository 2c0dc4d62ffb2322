"""Tiny-ImageNet: 100,000 training and 10,000 validation photographs of 64x64 pixels in 200 classes.

Le, Yang. Tiny ImageNet Visual Recognition Challenge. 2015. http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked
to ``<root>/tiny-imagenet-200`` as it is: ``train/CLASS/images``, and ``val/images`` with ``val_annotations.txt``. The
validation images serve as test; those in ``test`` have no labels.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset
from .files import InFiles, Whole
from .randaugment import RandAugment
from .views import Cutout, HorizontalFlip, RandomCrop, View, rotations

FOLDER = "tiny-imagenet-200"
WEAK: View = (Whole(), RandomCrop(), HorizontalFlip())


@register_dataset("tiny_imagenet")
class TinyImageNet(DataSet):
    """Views as for CIFAR-100; the crop's border is an eighth of the image."""

    num_classes = 200
    image_size = 64
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2302, 0.2265, 0.2262)
    model_family = "tiny_imagenet"
    public_teachers = True
    in_files = True
    views: ClassVar[dict[str, View]] = {
        "plain": (Whole(),),
        "weak": WEAK,
        "strong": (*WEAK, RandAugment(n=2), Cutout()),
        **rotations(WEAK),
        "test": (Whole(),),
    }

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """WordNet identifiers, sorted."""
        return tuple(sorted(self._lines(self.folder / "wnids.txt")))

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    def load(self) -> tuple[Split, Split]:
        number = {name: number for number, name in enumerate(self.classes)}
        train = {
            path: name for name in self.classes for path in sorted((self.folder / "train" / name).glob("images/*"))
        }
        empty = set(self.classes) - set(train.values())
        if empty:
            raise InputError(f"Tiny-ImageNet: {self.folder}/train/{min(empty)}/images holds no image; {self._advice}")
        lines = [line.split("\t") for line in self._lines(self.folder / "val" / "val_annotations.txt")]
        unknown = [words[0] for words in lines if len(words) < 2 or words[1] not in number]
        if unknown or not lines:
            raise InputError(f"Tiny-ImageNet: val_annotations.txt names no known class for {unknown}; {self._advice}")
        val = {self.folder / "val" / "images" / words[0]: words[1] for words in lines}
        return tuple(
            Split(
                InFiles([str(path) for path in split], self.image_size, self._advice),
                torch.tensor([number[name] for name in split.values()]),
            )
            for split in (train, val)
        )

    def _lines(self, path: Path) -> list[str]:
        try:
            return path.read_text().splitlines()
        except OSError as error:
            raise InputError(f"Tiny-ImageNet: cannot read {path}: {error.strerror}; {self._advice}") from None

    @property
    def _advice(self) -> str:
        return (
            f"unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip, so that {self.folder}/wnids.txt is there; "
            f"DATASET.ROOT names the folder that holds {FOLDER}"
        )
