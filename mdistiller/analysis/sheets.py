"""Contact sheets: many small images with their names in one picture, to check data and augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mdistiller.dataset import DataSet, Split
from mdistiller.dataset.randaugment import TRANSFORMS, transform_images
from mdistiller.dataset.views import Draws, apply_view

CELL, LARGEST = 64, 96  # pixels of an image's side: small images are enlarged by whole factors, large ones reduced
GAP, MARGIN = 3, 12
TITLE, LABEL, CAPTION = 20, 15, 12  # font sizes
HEAD = TITLE + 2 * MARGIN
PAGE = math.sqrt(2)  # ratio of the sides of a sheet of paper
CLASSES = 100  # largest number of classes on a sheet
LEVELS = (0.0, 0.25, 0.5, 0.75, 1 - 2**-24)  # shares of the ranges of magnitudes; random numbers are below 1

Cell = tuple[Tensor | None, str]  # an image (3, H, W) uint8, and the text below it


def contact_sheet(rows: Sequence[tuple[str, Sequence[Cell]]], title: str, group: int = 0) -> Image.Image:
    """Draw a line with name and images for each row.

    Args:
        rows: names and cells; all images have one size; the numbers of cells may differ.
        title: written above the images.
        group: number of cells after which a wider gap follows; 0: no wider gaps.
    """
    side = cell_side(rows)
    tops = [HEAD]
    for _, cells in rows:
        tops.append(tops[-1] + side + (CAPTION + 6 if any(caption for _, caption in cells) else GAP))
    margin = 2 * MARGIN + max(math.ceil(_font(LABEL).getlength(name)) for name, _ in rows)
    columns = range(max(len(cells) for _, cells in rows))
    lefts = [margin + x * (side + GAP) + (x // group * 3 * GAP if group else 0) for x in columns]
    width = max(lefts[-1] + side, MARGIN + math.ceil(_font(TITLE).getlength(title))) + MARGIN
    sheet = Image.new("RGB", (width, tops[-1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill="black", font=_font(TITLE))
    for (name, cells), top in zip(rows, tops, strict=False):
        pen.text((MARGIN, top + side // 2), name, fill="black", font=_font(LABEL), anchor="lm")
        for left, (image, caption) in zip(lefts, cells, strict=False):
            if image is not None:
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                way = Image.Resampling.BOX if image.shape[-1] > side else Image.Resampling.NEAREST
                sheet.paste(picture.resize((side, side), way), (left, top))
            pen.text((left, top + side + 1), _fitting(caption, 2 * side), fill="black", font=_font(CAPTION))
    return sheet


def cell_side(rows: Sequence[tuple[str, Sequence[Cell]]]) -> int:
    """Pixels of an image's side on the sheet."""
    size = next(image.shape[-1] for _, cells in rows for image, _ in cells if image is not None)
    return min(size * max(1, CELL // size), LARGEST)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitting(caption: str, room: int) -> str:
    """A caption, cut to ``room`` pixels."""
    whole = caption
    while _font(CAPTION).getlength(caption) > room:
        whole = whole[:-1]
        caption = f"{whole}…"
    return caption


def view_sheet(dataset: DataSet, split: Split, count: int = 8, epochs: int = 2, seed: int = 0) -> Image.Image:
    """``count`` images of the whole split without augmentation, and each of their views in the first epochs.

    Views with equal images share a row.
    """
    index = _spread(split, count)
    images = split.images.take(index)
    names, pictures = [["as it is"]], [images.pixels()]
    for name in sorted(dataset.views, key=lambda name: name == "strong"):  # the strongest view last
        for epoch in range(1, epochs + 1):
            views = apply_view(dataset.views[name], images, Draws.of_view(name, seed, epoch, index))
            same = next((row for row, shown in enumerate(pictures) if torch.equal(shown, views)), None)
            if same is None:
                names.append([name if epoch == 1 else f"{name}, epoch {epoch}"])
                pictures.append(views)
            elif name not in names[same]:
                names[same].append(name)
    labels = split.targets[index].tolist()
    rows = [(" = ".join(name), [(image, "") for image in shown]) for name, shown in zip(names, pictures, strict=True)]
    classes = [(image, dataset.classes[label]) for image, label in zip(pictures[0], labels, strict=True)]
    return contact_sheet([(rows[0][0], classes), *rows[1:]], f"{dataset.name}: views (seed {seed})")


def operation_sheet(dataset: DataSet, split: Split, count: int = 2) -> Image.Image:
    """RandAugment's operations on ``count`` images at five strengths; one image if all strengths are equal."""
    images = split.images.take(_spread(split, count)).pixels()
    rows = []
    for position, transform in enumerate(TRANSFORMS):
        cells: list[Cell] = []
        for image in images:
            results = transform_images(
                image.expand(len(LEVELS), -1, -1, -1), torch.full((len(LEVELS),), position), torch.tensor(LEVELS)
            )
            if all(torch.equal(results[0], other) for other in results[1:]):
                cells += [(results[0], "all the same"), *[(None, "")] * (len(LEVELS) - 1)]
            else:
                span = transform.high - transform.low
                cells += [(r, f"{transform.low + level * span:.3g}") for r, level in zip(results, LEVELS, strict=True)]
        rows.append((transform.name, cells))
    return contact_sheet(rows, f"{dataset.name}: RandAugment's operations by strength", group=len(LEVELS))


def class_sheet(dataset: DataSet, split: Split, count: int = 2, classes_in_row: int = 10) -> Image.Image:
    """The first ``count`` images of each class with the class's name; a row holds ``classes_in_row`` classes."""
    shown, rows = min(dataset.num_classes, CLASSES), []
    for first in range(0, shown, classes_in_row):
        numbers, cells = range(first, min(first + classes_in_row, shown)), []
        for label in numbers:
            images = split.images.take((split.targets == label).nonzero()[:count, 0]).pixels()
            cells += [(image, "" if place else dataset.classes[label]) for place, image in enumerate(images)]
            cells += [(None, "")] * (count - len(images))
        rows.append((f"{numbers[0]} to {numbers[-1]}", cells))
    of_all = f" of the first {shown}" if shown < dataset.num_classes else f", {shown}"
    return contact_sheet(rows, f"{dataset.name}: classes{of_all}", group=count)


def page(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets in one picture, line by line. The width is chosen for a ratio of sides near that of a sheet of paper."""
    widths = {
        sum(sheet.width for sheet in sheets[a:b]) for a in range(len(sheets)) for b in range(a + 1, len(sheets) + 1)
    }
    widest = max(sheet.width for sheet in sheets)
    return min((_in_lines(sheets, width) for width in sorted(widths) if width >= widest), key=_far_from_paper)


def _far_from_paper(picture: Image.Image) -> float:
    return abs(math.log(max(picture.size) / min(picture.size) / PAGE))


def _in_lines(sheets: Sequence[Image.Image], width: int) -> Image.Image:
    lines: list[list[Image.Image]] = [[]]
    for sheet in sheets:
        if sum(s.width for s in lines[-1]) + sheet.width > width:
            lines.append([])
        lines[-1].append(sheet)
    heights = [max(sheet.height for sheet in line) for line in lines]
    whole = Image.new("RGB", (width, sum(heights)), "white")
    for number, line in enumerate(lines):
        left = 0
        for sheet in line:
            whole.paste(sheet, (left, sum(heights[:number])))
            left += sheet.width
    return whole


def _spread(split: Split, count: int) -> Tensor:
    """Positions in the whole split. The step is odd, so that periodic labels do not give the same class each time."""
    return (torch.arange(count) * (len(split) // count | 1)) % len(split)
