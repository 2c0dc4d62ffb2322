"""Contact sheets: many small images with their names on one picture, to look at data and augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mdistiller.dataset import DataSet, Split
from mdistiller.dataset.randaugment import TRANSFORMS, transform_images
from mdistiller.dataset.views import Draws, apply_view

CELL = 64  # pixels that a side of an image takes on the sheet, rounded to whole multiples of its own
GAP = 3
LEVELS = (0.0, 0.25, 0.5, 0.75, 1 - 2**-24)  # of the ranges of magnitudes; draws stay below 1


def contact_sheet(rows: Sequence[tuple[str, Tensor]], title: str) -> Image.Image:
    """One line of images for each row, behind its name.

    Args:
        rows: names and ``(n, 3, H, W)`` uint8 images, all of one size; the numbers may differ.
        title: written above.
    """
    _, _, height, width = rows[0][1].shape
    zoom = max(1, CELL // height)
    high, wide = height * zoom + GAP, width * zoom + GAP
    margin = 12 + max(int(ImageDraw.ImageDraw(Image.new("RGB", (1, 1))).textlength(name)) for name, _ in rows)
    size = (margin + wide * max(len(images) for _, images in rows), 22 + high * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 5), title, fill="black")
    for line, (name, images) in enumerate(rows):
        top = 22 + line * high
        pen.text((6, top + high // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            cell = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            cell = cell.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(cell, (margin + column * wide, top))
    return sheet


def view_sheet(dataset: DataSet, split: Split, count: int = 12, epochs: int = 3, seed: int = 0) -> Image.Image:
    """``count`` images spread over the split as they are, and each view of them in the first epochs."""
    index = _spread(split, count)
    images = split.images.take(index)
    rows = [("as it is", images.pixels())]
    for name, view in dataset.views.items():
        for epoch in range(1, epochs + 1):
            drawn = Draws.of_view(name, seed, epoch, index)
            rows.append((f"{name}, epoch {epoch}", apply_view(view, images, drawn)))
    return contact_sheet(rows, f"{dataset.name}: views, seed {seed}")


def operation_sheet(dataset: DataSet, split: Split, count: int = 3) -> Image.Image:
    """RandAugment's operations on ``count`` images at five strengths; what has no strength is shown as often."""
    images = split.images.take(_spread(split, count)).pixels().repeat_interleave(len(LEVELS), 0)
    level = torch.tensor(LEVELS).repeat(count)
    rows = [("as it is", images)]
    for position, transform in enumerate(TRANSFORMS):
        found = transform_images(images, torch.full((len(images),), position), level)
        rows.append((f"{transform.name} {transform.low:g} .. {transform.high:g}", found))
    return contact_sheet(rows, f"{dataset.name}: RandAugment's operations, {count} images at five strengths each")


def class_sheet(dataset: DataSet, split: Split, count: int = 2, classes_in_row: int = 10) -> Image.Image:
    """The first ``count`` images of each class, side by side; a row holds ``classes_in_row`` classes."""
    rows = []
    for first in range(0, dataset.num_classes, classes_in_row):
        names = range(first, min(first + classes_in_row, dataset.num_classes))
        found = [split.images.take((split.targets == label).nonzero()[:count, 0]).pixels() for label in names]
        rows.append((f"{names[0]} .. {names[-1]}", torch.cat(found)))
    return contact_sheet(rows, f"{dataset.name}: {count} images of each class")


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _spread(split: Split, count: int) -> Tensor:
    """Positions over the whole split; the odd step avoids meeting the same class again and again."""
    return (torch.arange(count) * (len(split) // count | 1)) % len(split)
