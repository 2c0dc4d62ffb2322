"""Pictures with boxes: truth, teacher and student side by side."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mdistiller.engine.forwards.precision import Precision

from .data import Pictures, TestBatches
from .task import predictions

WIDTH, GAP, HEAD = 256, 6, 18  # pixels of a picture, between pictures, of the row of titles
THRESHOLD = 0.5


class First(TestBatches):
    """The first pictures of a data set, one batch."""

    def __init__(self, data: Pictures, count: int) -> None:
        super().__init__(data, count)
        self.batches = self.batches[:1]


def comparison(data: Pictures, networks: dict[str, nn.Module], precision: Precision, count: int = 6) -> Image.Image:
    """One row for each of the first pictures: the true boxes, then each network's boxes that are likely enough.

    Args:
        data: the pictures.
        networks: detectors by title.
        precision: where and in which number format they run.
        count: number of rows.
    """
    loader = First(data, count)
    (batch,) = loader
    columns = {"truth": [{"boxes": t["boxes"], "labels": t["labels"]} for t in batch["target"]]}
    for title, network in networks.items():
        ((_, found),) = predictions(network, loader, precision)
        columns[title] = [likely(own) for own in found]
    rows = [
        [draw(image, own[place], data.names) for own in columns.values()] for place, image in enumerate(batch["image"])
    ]
    height = HEAD + sum(row[0].height + GAP for row in rows)
    canvas = Image.new("RGB", ((WIDTH + GAP) * len(columns) - GAP, height - GAP), "white")
    for place, title in enumerate(columns):
        ImageDraw.Draw(canvas).text((place * (WIDTH + GAP) + 2, 3), title, fill="black")
    y = HEAD
    for row in rows:
        for place, picture in enumerate(row):
            canvas.paste(picture, (place * (WIDTH + GAP), y))
        y += row[0].height + GAP
    return canvas


def likely(found: dict[str, Tensor]) -> dict[str, Tensor]:
    keep = found["scores"] >= THRESHOLD
    return {name: value[keep].cpu() for name, value in found.items()}


def draw(image: Tensor, boxes: dict[str, Tensor], names: list[str]) -> Image.Image:
    """A picture ``(3, H, W)`` uint8, ``WIDTH`` pixels wide, with its boxes, their classes and scores."""
    scale = WIDTH / image.shape[2]
    size = WIDTH, round(image.shape[1] * scale)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    scores = boxes.get("scores", torch.full((len(boxes["labels"]),), float("nan"))).tolist()
    for box, label, score in zip(boxes["boxes"].tolist(), boxes["labels"].tolist(), scores, strict=True):
        colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(0.618 * label % 1, 1, 1))
        corners = [scale * corner for corner in box]
        pen.rectangle(corners, outline=colour, width=2)
        text = names[label - 1] if score != score else f"{names[label - 1]} {score:.2f}"
        place = corners[0] + 2, max(corners[1] - 11, 0)
        pen.rectangle(pen.textbbox(place, text), fill="black")
        pen.text(place, text, fill="white")
    return picture


def save(path: Path, *args: Any) -> None:
    """Write :func:`comparison` to a PNG file."""
    comparison(*args).save(path)
