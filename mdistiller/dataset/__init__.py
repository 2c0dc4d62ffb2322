"""Data sets, views and loaders; one file per data set. ``get_dataset(cfg)`` is mdistiller's entry."""

from mdistiller.registry import dataset_dict, open_dataset

from .base import DataSet, Split, register_dataset
from .build import Loaders, Splits, build_loaders, get_dataset, load_splits
from .cifar10 import CIFAR10
from .cifar100 import CIFAR100
from .digits import Digits
from .folder import Folder
from .imagenet import ImageNet
from .loader import Loader
from .shapes import Shapes
from .stl10 import STL10
from .tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "DataSet",
    "Digits",
    "Folder",
    "ImageNet",
    "Loader",
    "Loaders",
    "Shapes",
    "Split",
    "Splits",
    "TinyImageNet",
    "build_loaders",
    "dataset_dict",
    "get_dataset",
    "load_splits",
    "open_dataset",
    "register_dataset",
]
