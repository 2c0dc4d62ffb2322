"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation photographs in 1000 classes, which serve as test.

Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge. IJCV 2015. https://www.image-net.org. The images
must be fetched there by hand; in ``<root>/imagenet/train`` and ``<root>/imagenet/val`` lies one folder for each class.
They do not fit into memory, so they stay files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from mdistiller.registry import InputError

from .base import register_dataset
from .folder import Folder


@register_dataset("imagenet")
class ImageNet(Folder):
    """Views as in mdistiller: ``weak`` is a random crop and flip; to test, the middle."""

    num_classes = 1000
    photographs = False  # as torchvision's reader, which published figures are made with
    defaults: ClassVar[dict[str, Any]] = {}
    advice = "download the image again, or delete it if its class has other images"
    sorting = (
        "the validation archive is flat, and valprep.sh (https://github.com/soumith/imagenetloader.torch), run in that "
        "folder, sorts it into the classes' folders"
    )

    def places_below(self, root: Path) -> dict[str, Path]:
        return {"train": root / "imagenet" / "train", "test": root / "imagenet" / "val"}

    def class_folders(self, folder: Path) -> tuple[str, ...]:
        found = super().class_folders(folder)
        if len(found) != self.num_classes:
            raise InputError(f"{folder} holds {len(found)} folders: {self.wanted(folder)}")
        return found

    def wanted(self, folder: Path) -> str:
        return (
            f"ImageNet must be fetched by hand (https://www.image-net.org), and {folder} must hold one folder for each "
            f"of its {self.num_classes} classes; DATASET.ROOT names the folder that holds imagenet"
        )
