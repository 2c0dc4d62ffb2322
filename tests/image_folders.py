"""Writes folders of small images, one for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(50, 40), (31, 64), (40, 40), (16, 90)]


def write_images(folder: Path, classes: Sequence[str], count: int = 4, suffix: str = ".png") -> None:
    """``count`` photographs of noise in several sizes for each class, the second of them grey.

    A class has a tint of its own, which tells it from the others.
    """
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        tint = np.roll((160, 0, 0), number)
        for image in range(count):
            width, height = SIZES[image % len(SIZES)]
            pixels = tint + random.integers(0, 96, (height // 8 + 1, width // 8 + 1, 3))
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
            (picture.convert("L") if image == 1 else picture).save(folder / name / f"{image}{suffix}")
