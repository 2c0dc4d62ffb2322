"""CIFAR-100: 50,000 training and 10,000 test photographs of 32x32 pixels in 100 classes.

Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009.
https://www.cs.toronto.edu/~kriz/cifar.html: the files are that page's "python version", in
``<root>/cifar-100-python``; torchvision fetches and verifies them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from mdistiller.messages import warn
from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset, resize_images
from .randaugment import RandAugment
from .views import Cutout, HorizontalFlip, RandomCrop, View, rotations

OFFICIAL = datasets.CIFAR100
FOLDER = OFFICIAL.base_folder
MD5 = dict(OFFICIAL.train_list + OFFICIAL.test_list)  # of the files "train" and "test"


@register_dataset("cifar100")
class CIFAR100(DataSet):
    """Views as in mdistiller (weak) and in VRM's supplement 8.2 (strong)."""

    num_classes = 100
    image_size = 32
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    model_family = "cifar"
    public_teachers = True
    views: ClassVar[dict[str, View]] = {
        "plain": (),
        "weak": (RandomCrop(), HorizontalFlip()),
        "strong": (RandomCrop(), HorizontalFlip(), RandAugment(n=2), Cutout()),
        **rotations((RandomCrop(), HorizontalFlip())),
    }

    def load(self) -> tuple[Split, Split]:
        folder = self.root / FOLDER
        missing = [name for name in MD5 if not (folder / name).is_file()]
        if missing and not self.download:
            raise InputError(
                f"CIFAR-100: {folder / missing[0]} is missing and DATASET.DOWNLOAD is off; turn downloads on, or "
                f"{_how_to_get(folder)}"
            )
        if missing:
            _download(self.root)
        train, test = _read_split(folder / "train"), _read_split(folder / "test")
        if not all(check_integrity(folder / name, md5) for name, md5 in MD5.items()):
            warn(
                f"{folder} does not hold the official CIFAR-100 files, which have 50000 and 10000 images; "
                f"using the {len(train)} training and {len(test)} test images found there"
            )
        return tuple(Split(resize_images(s.images.pixels(), self.image_size), s.targets) for s in (train, test))


def _how_to_get(folder: Path) -> str:
    return (
        "download the python version of CIFAR-100 from https://www.cs.toronto.edu/~kriz/cifar.html and "
        f"unpack it, so that the files are {folder}/train and {folder}/test, or set DATASET.ROOT to the "
        f"folder that holds {FOLDER}"
    )


def _download(root: Path) -> None:
    try:
        OFFICIAL(root, download=True)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: what came is damaged
        raise InputError(
            f"CIFAR-100 is not in {root / FOLDER} and could not be downloaded ({error}); {_how_to_get(root / FOLDER)}"
        ) from error


def read_split(path: Path, key: str = "fine_labels", classes: int = 100) -> Split:
    """A pickled dictionary with ``data``, ``(N, 3072)`` uint8, and labels.

    Args:
        path: the file.
        key: of the labels.
        classes: number of them.

    Raises:
        Exception: anything, for a damaged file.
    """
    with path.open("rb") as file:
        entry = _DataUnpickler(file, encoding="latin1").load()
    data, labels = entry["data"], entry[key]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and len(data)):
        raise ValueError("'data' is not a filled table of bytes")
    if data.shape[1] != 3 * 32 * 32 or len(labels) != len(data):
        raise ValueError(f"'data' is {data.shape}, with {len(labels)} labels; expected (N, 3072) and N")
    labels = torch.tensor(labels)
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{key!r} are not integers from 0 to {classes - 1}")
    return Split(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), labels)


def _read_split(path: Path) -> Split:
    try:
        return read_split(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"CIFAR-100: cannot read {path}: {type(error).__name__}: {error}; delete {path.parent} and "
            f"{_how_to_get(path.parent)}"
        ) from error


class _DataUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy arrays, and refuses a pickle that asks for more."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocols 0 to 2
            return _encode_latin1
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data does not need")
        return super().find_class(module, name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
