"""A miniature of COCO: coloured shapes on blocky backgrounds, 64 pixels wide, in COCO's true format.

Six shapes (circle, square, triangle, cross, ring, star), one to four a picture, drawn from a fixed seed. 600 pictures
for training, 150 for tests; category ids have gaps, as COCO's have, and some pictures have no object.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("circle", "square", "triangle", "cross", "ring", "star")
IDS = (1, 2, 4, 5, 7, 9)
SPLITS = {"train": (600, 0), "test": (150, 1)}  # number of pictures, seed
SIDE = 64
VERSION = "1"


def write(folder: Path) -> None:
    """Write the data set, unless it is there already. Two processes may do so at once.

    Args:
        folder: ``annotations/train.json``, ``train/*.png`` and the same of ``test`` come to lie in it.
    """
    stamp = folder / "version"
    if stamp.is_file() and stamp.read_text() == VERSION:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (draft / "annotations").mkdir()
        for split, (count, seed) in SPLITS.items():
            (draft / split).mkdir()
            content = {"images": [], "annotations": [], "categories": []}
            content["categories"] = [
                {"id": id, "name": name, "supercategory": "shape"} for id, name in zip(IDS, NAMES, strict=True)
            ]
            random = np.random.Generator(np.random.PCG64(seed))
            for number in range(1, count + 1):
                image, shapes = draw(random)
                name = f"{number:06}.png"
                Image.fromarray(image).save(draft / split / name)
                content["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
                for kind, (x, y, side), area in shapes:
                    content["annotations"].append(
                        {
                            "id": len(content["annotations"]) + 1,
                            "image_id": number,
                            "category_id": IDS[kind],
                            "bbox": [x, y, side, side],
                            "area": area,
                            "iscrowd": 0,
                        }
                    )
            (draft / "annotations" / f"{split}.json").write_text(json.dumps(content))
        (draft / "version").write_text(VERSION)
        try:
            os.replace(draft, folder)
        except OSError:  # it holds files: of an interrupted write, or of a process that was faster
            if not (stamp.is_file() and stamp.read_text() == VERSION):
                shutil.rmtree(folder)
                os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draw(random: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int], int]]]:
    """A picture ``(64, 64, 3)`` uint8, and of each shape its kind, its square ``x, y, side`` and its visible area."""
    blocks = random.integers(60, 200, (4, 4, 3))
    image = np.kron(blocks, np.ones((SIDE // 4, SIDE // 4, 1))).astype(np.float64)
    image += random.normal(0, 4, image.shape)
    shapes, taken = [], np.zeros((SIDE, SIDE), bool)
    wanted = 0 if random.random() < 0.02 else int(random.integers(1, 5))
    for _ in range(wanted):
        for _ in range(10):  # places without overlap
            side = int(random.integers(12, 29))
            x, y = (int(random.integers(0, SIDE - side + 1)) for _ in range(2))
            if not taken[y : y + side, x : x + side].any():
                break
        else:
            continue
        taken[y : y + side, x : x + side] = True
        kind, colour = int(random.integers(len(NAMES))), random.integers(0, 256, 3)
        mask = shape(kind, side)
        image[y : y + side, x : x + side][mask] = colour + random.normal(0, 4, (int(mask.sum()), 3))
        shapes.append((kind, (x, y, side), int(mask.sum())))
    return image.clip(0, 255).astype(np.uint8), shapes


def shape(kind: int, side: int) -> np.ndarray:
    """``(side, side)`` booleans of a shape that touches all four edges of its square."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)  # -1 to 1
    radius = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    if NAMES[kind] == "circle":
        return radius <= 1
    if NAMES[kind] == "square":
        return np.ones((side, side), bool)
    if NAMES[kind] == "triangle":
        return np.abs(x) <= (y + 1) / 2 + 1 / side
    if NAMES[kind] == "cross":
        return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
    if NAMES[kind] == "ring":
        return (radius <= 1) & (radius >= 0.6)
    turn = np.abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)  # a star of four tips, on the axes
    return radius * (np.cos(turn) + 2.2 * np.sin(turn)) <= 1
