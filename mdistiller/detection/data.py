"""Data sets in COCO's and in VOC's layout, and the batches of a run.

The folder of all data sets is the environment variable ``DETECTRON2_DATASETS``, as in detectron2, or ``data``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mdistiller.functional import draws
from mdistiller.messages import say
from mdistiller.registry import InputError, suggestion

from . import minicoco, voc

ORDER, FLIP = 1, 2  # keys of the draws


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO file of boxes.

    Raises:
        InputError: it is missing, no JSON or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no annotations {path} (seen from {Path.cwd()}); the environment variable DETECTRON2_DATASETS names the "
            "folder of all data sets"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the annotations {path}: {error}") from None
    parts = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id", "bbox")}
    for part, keys in {**parts, "categories": ("id", "name")}.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path} is no file of COCO's annotations: it has no list {part!r}")
        for entry in entries:
            if not all(key in entry for key in keys) or len(entry.get("bbox", (0, 0, 0, 0))) != 4:
                raise InputError(f"{path}: an entry of {part!r} must hold {', '.join(keys)}, got {str(entry)[:120]}")
    return content


@dataclass(frozen=True)
class Layout:
    """Where a data set lies, below the folder of all data sets.

    Args:
        annotations: the JSON file, or VOC's list of pictures.
        images: the folder of the pictures.
        read: gives the content of ``annotations`` in COCO's form.
        metric: ``"coco"``, ``"voc07"`` (eleven points) or ``"voc"``.
    """

    annotations: str
    images: str
    read: Callable[[Path], dict[str, Any]] = read_annotations
    metric: str = "coco"


def _voc(year: int, split: str) -> Layout:
    folder, metric = f"VOC{year}", "voc07" if year == 2007 else "voc"
    return Layout(f"{folder}/ImageSets/Main/{split}.txt", f"{folder}/JPEGImages", voc.read_annotations, metric)


LAYOUTS = {
    **{
        f"coco_{year}_{split}": Layout(f"coco/annotations/instances_{split}{year}.json", f"coco/{split}{year}")
        for year in (2014, 2017)
        for split in ("train", "val")
    },
    **{f"voc_{y}_{s}": _voc(y, s) for y in (2007, 2012) for s in ("train", "val", "trainval", "test")},
    **{
        f"minicoco_{split}": Layout(f"minicoco/annotations/{split}.json", f"minicoco/{split}")
        for split in minicoco.SPLITS
    },
}


def dataset_names() -> list[str]:
    return list(LAYOUTS)


def root() -> Path:
    return Path(os.environ.get("DETECTRON2_DATASETS", "data"))


@dataclass(frozen=True)
class Picture:
    """A picture and its true boxes.

    Args:
        file: the picture.
        id: COCO's.
        boxes: ``(G, 4)`` corners in pixels, float32.
        labels: ``(G,)`` from 1, in the order of the categories' ids; 0 is background.
        difficult: ``(G,)`` booleans; VOC's difficult objects are trained on and not scored.
    """

    file: Path
    id: int
    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Pictures:
    """A data set: its pictures in the order of their ids, and its categories.

    Crowds have no boxes of their own. Boxes are cut at the picture's border; boxes without area are left out.

    Args:
        name: of :data:`LAYOUTS`. ``minicoco_*`` is written if it is not there.
        with_boxes_only: leave out pictures without boxes.

    Raises:
        InputError: no such data set; files that are missing, unreadable or do not fit together.
    """

    def __init__(self, name: str, with_boxes_only: bool = False) -> None:
        if name not in LAYOUTS:
            raise InputError(f"no data set named {name!r}; {suggestion(name, LAYOUTS)}")
        self.name, layout = name, LAYOUTS[name]
        if name.startswith("minicoco"):
            minicoco.write(root() / "minicoco")
        self.annotations, folder = root() / layout.annotations, root() / layout.images
        content, self.metric = layout.read(self.annotations), layout.metric
        self.categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in self.categories]
        self.areas: list[float] = []
        """Of all objects that are no crowds, in pixels."""
        self.pictures = list(self._pictures(content, folder, with_boxes_only))
        if not self.pictures:
            raise InputError(f"{name}: {self.annotations} has no picture{' with boxes' if with_boxes_only else ''}")
        looked_at = self.pictures[:: max(len(self.pictures) // 100, 1)]
        missing = next((picture.file for picture in looked_at if not picture.file.is_file()), None)
        if missing is not None:
            raise InputError(f"{name}: there is no picture {missing}, which {self.annotations} names")

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return [category["name"] for category in self.categories]

    def __len__(self) -> int:
        return len(self.pictures)

    def add(self, other: Pictures) -> None:
        """Append the pictures of another data set, for training.

        Raises:
            InputError: its classes are others.
        """
        if other.names != self.names:
            raise InputError(f"{other.name} has other classes than {self.name}, so they cannot be trained on together")
        self.pictures += other.pictures

    def _pictures(self, content: dict[str, Any], folder: Path, with_boxes_only: bool) -> Iterator[Picture]:
        number = {id: place for place, id in enumerate(self.category_ids, 1)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        boxes: dict[int, list[list[float]]] = {id: [] for id in sizes}
        labels: dict[int, list[int]] = {id: [] for id in sizes}
        difficult: dict[int, list[bool]] = {id: [] for id in sizes}
        dropped = 0
        for annotation in content["annotations"]:
            image, category = annotation["image_id"], annotation["category_id"]
            if image not in sizes or category not in number:
                what, id = ("picture", image) if image not in sizes else ("category", category)
                raise InputError(
                    f"{self.annotations}: annotation {annotation.get('id')} is of {what} {id}, which it lacks"
                )
            if annotation.get("iscrowd"):
                continue
            (x, y, w, h), (width, height) = annotation["bbox"], sizes[image]
            corners = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
            if not (corners[2] > corners[0] and corners[3] > corners[1]):  # true for what is no number, too
                dropped += 1
                continue
            boxes[image].append(corners)
            self.areas.append(annotation.get("area", w * h))
            labels[image].append(number[category])
            difficult[image].append(bool(annotation.get("difficult")))
        if dropped:
            say(f"{self.name}: {dropped} boxes without area in their picture are left out")
        for image in sorted(content["images"], key=lambda image: image["id"]):
            id = image["id"]
            if boxes[id] or not with_boxes_only:
                own = torch.tensor(boxes[id], dtype=torch.float32).reshape(-1, 4)
                flags = torch.tensor(labels[id], dtype=torch.int64), torch.tensor(difficult[id], dtype=torch.bool)
                yield Picture(folder / image["file_name"], id, own, *flags)


def read_picture(path: Path) -> Tensor:
    """``(3, H, W)`` uint8, red first.

    Raises:
        InputError: a file that is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the picture {path}: {error}") from None


def flipped(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """A picture ``(3, H, W)`` and its boxes ``(G, 4)``, mirrored left to right."""
    width = image.shape[2]
    return image.flip(2), torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


class _Reader(torch.utils.data.Dataset):
    """Reads ``(position, flip)`` in the loader's processes. An error is returned, since it would lose its kind."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures

    def __getitem__(self, key: tuple[int, bool]) -> Any:
        picture = self.pictures[key[0]]
        try:
            image = read_picture(picture.file)
        except InputError as error:
            return str(error)
        boxes = picture.boxes
        if key[1]:
            image, boxes = flipped(image, boxes)
        return image, {"boxes": boxes, "labels": picture.labels, "id": picture.id}


class Batches:
    """Batches of pictures, in rounds of steps; a run's loader.

    Order and flips are functions of the seed and of the number of a step, so a resumed run continues with the same
    pictures. Every picture is seen once before one is seen again.

    Args:
        data: the pictures.
        batch_size: of a step, all processes together.
        steps: of each round.
        seed: of order and flips.
        flip: mirror half of the pictures.
        workers: processes that read; 0: this process reads.
        share: this process and their number: it gets its part of each batch.
    """

    def __init__(
        self,
        data: Pictures,
        batch_size: int,
        steps: list[int],
        seed: int,
        flip: bool,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.data, self.batch_size, self.steps, self.seed, self.flip = data, batch_size, steps, seed, flip
        self.workers, self.share = workers, share
        self.num_data = len(data)
        self.last_batch_size = batch_size
        self.round, self.done = 1, 0

    def __len__(self) -> int:
        return self.steps[min(self.round, len(self.steps)) - 1]

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Go to a round and to a step in it."""
        self.round, self.done = epoch, done

    def images_in(self, step: int) -> int:
        """Pictures of a step, all processes together."""
        return self.batch_size

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        first = sum(self.steps[: self.round - 1])
        keys = [self.keys_of(first + step) for step in range(self.done, len(self))]
        return read(self.data.pictures, keys, self.workers)

    def keys_of(self, step: int) -> list[tuple[int, bool]]:
        """Positions and flips of this process's pictures of a step, counted from 0."""
        places = torch.arange(step * self.batch_size, (step + 1) * self.batch_size).tensor_split(self.share[1])
        keys = []
        for place in places[self.share[0]].tolist():
            turn, position = divmod(place, self.num_data)
            if turn != getattr(self, "_turn", None):
                self._turn, self._order = turn, draws.permutation(self.num_data, self.seed, ORDER, turn)
            index = int(self._order[position])
            keys.append((index, self.flip and bool(draws.uniform(self.seed, FLIP, turn, index) < 0.5)))
        return keys


class TestBatches:
    """All pictures in their order, in batches that the processes take turns with."""

    def __init__(self, data: Pictures, batch_size: int = 8, workers: int = 0, share: tuple[int, int] = (0, 1)) -> None:
        self.data, self.workers, self.share = data, workers, share
        places = list(range(len(data)))
        self.batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        own = self.batches[self.share[0] :: self.share[1]]
        return read(self.data.pictures, [[(place, False) for place in batch] for batch in own], self.workers)


def read(pictures: list[Picture], keys: list[list[tuple[int, bool]]], workers: int) -> Iterator[dict[str, list[Any]]]:
    """Batches ``{"image": [(3, H, W) uint8], "target": [boxes, labels and id], "index": [position]}``."""
    loader = DataLoader(
        _Reader(pictures),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),  # else it would draw from the run's
    )
    for own, items in zip(keys, loader, strict=True):
        for item in items:
            if isinstance(item, str):
                raise InputError(item)
        images, targets = map(list, zip(*items, strict=True))
        yield {"image": images, "target": targets, "index": torch.tensor([place for place, _ in own])}
