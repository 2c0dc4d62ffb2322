"""Images of your own: one folder of images for each class.

``DATASET.FOLDER.TRAIN`` names the folder that holds the classes' folders, ``DATASET.FOLDER.TEST`` that of the test
images. The classes are the folders in ``TRAIN``, in alphabetical order. Without ``TRAIN``, ``DATASET.ROOT`` holds
``train`` and, for the test images, ``test`` or ``val``. Without test images, a fifth of each class is held out.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from mdistiller.functional import draws
from mdistiller.messages import say, warn
from mdistiller.options import Option
from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset
from .files import InFiles, RandomResizedCrop, ResizeAndCentreCrop, readable
from .randaugment import RandAugment
from .subsets import ranks_in_class
from .views import Cutout, HorizontalFlip, View, name_key, rotations

TEST_FRACTION = 0.2
SPLIT_KEY = name_key("folder test split")  # in place of a seed: teachers and students of any seed share the test images
SUFFIXES = (*IMG_EXTENSIONS, ".gif")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
LISTED = 10  # names in a message

PHOTOGRAPHS: dict[str, View] = {
    "plain": (ResizeAndCentreCrop(),),
    "weak": (RandomResizedCrop(), HorizontalFlip()),
    "strong": (RandomResizedCrop(), HorizontalFlip(), RandAugment(n=2), Cutout()),
    **rotations((RandomResizedCrop(), HorizontalFlip())),
    "test": (ResizeAndCentreCrop(),),
}
"""Views as for ImageNet in mdistiller: ``weak`` is a random crop and flip; to test, the middle."""

BAD_IMAGE = Option("stop", "an image that cannot be read. stop: the run ends and names the file; skip: each image is "
                   "read once before the run, and unreadable ones are listed and left out", one_of=("stop", "skip"),
                   role="data")  # fmt: skip


def folder_option(help: str) -> Option:
    return Option("", help, role="place")


@register_dataset("folder")
class Folder(DataSet):
    """Mean and standard deviation are ImageNet's unless ``DATASET.MEAN`` and ``DATASET.STD`` say otherwise."""

    image_size = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    model_family = "imagenet"
    in_files = True
    views = PHOTOGRAPHS
    defaults: ClassVar[dict[str, Any]] = {
        "TRAIN": folder_option("folder that holds one folder of training images for each class; empty: train below "
                               "DATASET.ROOT"),
        "VAL": folder_option("images on which epochs are compared, in folders as TRAIN; without TEST, the test images"),
        "TEST": folder_option("test images, in folders as TRAIN; empty: VAL, or else a fifth of each class of TRAIN"),
        "BAD_IMAGE": BAD_IMAGE,
    }  # fmt: skip
    photographs = True  # turned as EXIF says; large ones are decoded at a reduced size
    sorting = "move those of each class into a folder of their own"
    advice = "replace or delete the file, or set DATASET.FOLDER.BAD_IMAGE skip"
    test_folders: ClassVar[tuple[str, ...]] = ("test", "val")  # below DATASET.ROOT; the first that is there is used

    @cached_property
    def classes(self) -> tuple[str, ...]:
        found = self.class_folders(self.places["train"])
        if len(found) == 1:
            raise InputError(
                f"{self.places['train']} holds the folder of one class only, {found[0]!r}: "
                f"{self.wanted(self.places['train'])}"
            )
        return found

    @cached_property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def places(self) -> dict[str, Path]:
        """The folders of ``train``, ``test`` and ``val``, as far as there are such."""
        given = {name: self.options.get(name) for name in ("train", "val", "test")}
        found = {name: Path(folder).expanduser() for name, folder in given.items() if folder}
        if not found:
            return self.places_below(self.root)
        if "train" not in found:
            name = next(iter(found)).upper()
            raise InputError(f"DATASET.FOLDER.{name} is given and TRAIN is not; name the training images by TRAIN")
        if "val" in found and "test" not in found:
            found["test"] = found.pop("val")
        return found

    def places_below(self, root: Path) -> dict[str, Path]:
        found = [root / name for name in self.test_folders if (root / name).is_dir()]
        if len(found) > 1:
            warn(f"test images are read from {found[0]}; images in {found[1]} are not used")
        return {"train": root / "train"} | ({"test": found[0]} if found else {})

    def load(self) -> tuple[Split, ...]:
        return self.splits

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """Training and test images, and those on which epochs are compared, if there are such."""
        train = self.read(self.places["train"])
        if "test" in self.places:
            return (train, *(self.read(self.places[name]) for name in ("test", "val") if name in self.places))
        held_out = _held_out(train, self.places["train"])
        test = train.take(held_out.nonzero()[:, 0])
        say(
            f"{self.places['train']}: no test images are given, so {len(test)} of {len(train)} images, a fifth of each "
            "class, are held out as test images; their names decide which"
        )
        return train.take((~held_out).nonzero()[:, 0]), test

    def read(self, folder: Path) -> Split:
        """The images in the classes' folders below ``folder``.

        Raises:
            InputError: the folder is missing, has a class that the training images lack, or a class without images.
        """
        found, number = self.class_folders(folder), {name: number for number, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in number]
        if unknown:
            raise InputError(
                f"{folder} holds the class {unknown[0]!r}, which {self.places['train']} lacks: {self.wanted(folder)}"
            )
        paths, targets, ignored = [], [], Counter()
        for name in found:
            files = _files_below(folder / name)
            images = [path for path in files if path.lower().endswith(SUFFIXES)]
            ignored.update(Path(path).suffix or "no suffix" for path in set(files).difference(images))
            if not images:
                raise InputError(
                    f"the class {name!r} has no image in {folder / name}; add images ({', '.join(SUFFIXES)}) or delete "
                    "the folder"
                )
            paths += images
            targets += [number[name]] * len(images)
        beside = sum(path.lower().endswith(SUFFIXES) for path in _visible_files(folder))
        if beside:
            warn(f"{beside} images lie in {folder} itself and not in the folder of a class; they are not used")
        if ignored:
            kinds = ", ".join(f"{count} {suffix!r}" for suffix, count in ignored.most_common(LISTED))
            say(f"{folder}: files that are no images by their names are not used: {kinds}")
        images = InFiles(paths, self.image_size, self.advice, self.photographs)
        return self.without_bad(Split(images, torch.tensor(targets)), folder)

    def without_bad(self, split: Split, place: Path) -> Split:
        """The images that can be read, if ``BAD_IMAGE`` is ``skip``; else all.

        Raises:
            InputError: a class has none.
        """
        if self.options.get("bad_image") != "skip":
            return split
        good = readable(split.images)
        bad = [split.images.names[position] for position in (~good).nonzero()[:, 0].tolist()]
        if bad:
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            warn(
                f"{len(bad)} of {len(split)} images in {place} cannot be read and are left out: "
                f"{', '.join(map(repr, bad[:LISTED]))}{more}"
            )
        found = split.take(good.nonzero()[:, 0])
        empty = set(split.targets.tolist()) - set(found.targets.tolist())
        if empty:
            raise InputError(f"no image of the class {self.classes[min(empty)]!r} in {place} can be read")
        return found

    def class_folders(self, folder: Path) -> tuple[str, ...]:
        """Names of the classes' folders in ``folder``, sorted.

        Raises:
            InputError: there is none.
        """
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: {self.wanted(folder)}")
        found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
        if not found:
            flat = any(path.lower().endswith(SUFFIXES) for path in _visible_files(folder))
            problem = f"the images lie in {folder} itself; {self.sorting}" if flat else f"{folder} holds no folder"
            raise InputError(f"{problem}: {self.wanted(folder)}")
        if len(found) > 1 and SPLIT_NAMES.issuperset(map(str.lower, found)):
            raise InputError(
                f"{folder} holds {', '.join(found)}, which are no classes: DATASET.ROOT {folder} reads train and test"
            )
        return found

    def wanted(self, folder: Path) -> str:
        """The layout that is expected, for messages."""
        return (
            f"{folder} must hold one folder of images for each class; DATASET.FOLDER.TRAIN and TEST name such folders, "
            "or DATASET.ROOT names the folder that holds train and val (or test)"
        )


def _held_out(split: Split, folder: Path) -> Tensor:
    """``(N,)`` bool: a fifth of each class, at least one of two. An image's name below ``folder`` gives its place in
    the order of its class, so that a further image moves at most one other image between the halves."""
    names = [os.fsencode(os.path.relpath(name, folder)) for name in split.images.names]
    marks = draws.hash_keys(SPLIT_KEY, torch.tensor([zlib.crc32(name) for name in names]))
    count = split.targets.bincount()
    wanted = (count * TEST_FRACTION + 0.5).floor().long().clamp(min=1).minimum(count - 1)
    return ranks_in_class(split.targets, marks.argsort(stable=True)) < wanted[split.targets]


def _files_below(folder: Path) -> list[str]:
    """All files in ``folder`` and the folders below it, hidden ones left out, in the order of torchvision."""
    found = []
    for place, folders, names in sorted(_walk(folder)):
        del folders
        found += [os.path.join(place, name) for name in sorted(names) if name[0] != "."]
    return found


def _walk(folder: Path) -> list[tuple[str, list[str], list[str]]]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found.append((place, folders, names))
    return found


def _visible_files(folder: Path) -> Sequence[str]:
    return [entry.name for entry in folder.iterdir() if entry.name[0] != "." and entry.is_file()]
