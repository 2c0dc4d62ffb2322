"""PASCAL VOC: its layout, read as COCO's, and its average precision.

The folder has VOC's own form: ``VOC2007/Annotations/*.xml``, ``VOC2007/ImageSets/Main/trainval.txt``,
``VOC2007/JPEGImages/*.jpg``. Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from mdistiller.registry import InputError

NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
THRESHOLDS = tuple(range(50, 100, 5))  # IoU in percent


def read_annotations(split: Path) -> dict[str, Any]:
    """The annotations of a split in the form of a COCO file; an annotation also has ``difficult``.

    VOC counts pixels from 1 and includes the last one, so a box begins one pixel further up and left here.

    Args:
        split: ``VOC2007/ImageSets/Main/trainval.txt``.

    Raises:
        InputError: a file that is missing or no annotation of VOC.
    """
    folder = split.parents[2] / "Annotations"
    try:
        stems = split.read_text().split()
    except OSError as error:
        raise InputError(
            f"no list of pictures {split} (seen from {Path.cwd()}): {error.strerror}; the environment variable "
            "DETECTRON2_DATASETS names the folder of all data sets"
        ) from None
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": categories}
    for id, stem in enumerate(stems, 1):
        path = folder / f"{stem}.xml"
        try:
            tree = ElementTree.parse(path).getroot()
            width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
            content["images"].append({"id": id, "file_name": f"{stem}.jpg", "width": width, "height": height})
            for entry in tree.iter("object"):
                x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": id,
                        "category_id": NAMES.index(entry.findtext("name")) + 1,
                        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                        "difficult": int(entry.findtext("difficult") or 0),
                    }
                )
        except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no annotation of VOC: {error}") from None
    return content


def average_precision(hits: Sequence[bool], objects: int, eleven_points: bool) -> float:
    """The area under precision over recall, 0 to 1.

    Args:
        hits: of each detection, the most likely first: whether it finds an object.
        objects: number of objects.
        eleven_points: VOC 2007's mean of the best precision at recalls of at least 0, 0.1 ... 1; else the area under
            the best precision at each recall or more.
    """
    if not objects:
        return 0.0
    true = np.cumsum(np.asarray(hits, dtype=np.float64))
    recall, precision = true / objects, true / np.arange(1, len(true) + 1)
    if eleven_points:
        at_least = [precision[recall >= point] for point in np.linspace(0, 1, 11)]
        return float(np.mean([part.max(initial=0.0) for part in at_least]))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def scores(pictures: Sequence[Any], found: dict[int, dict[str, Tensor]], eleven_points: bool) -> dict[str, float]:
    """``AP50``, ``AP`` (mean over IoU 0.5 to 0.95) and ``AP75`` in percent, means over the classes with objects.

    An object is found once, by the most likely detection whose best IoU is with it and above the threshold. Difficult
    objects do not count, nor do detections of them.

    Args:
        pictures: with ``id``, ``boxes``, ``labels`` and ``difficult``.
        found: of each picture's id ``boxes``, ``labels`` and ``scores``.
        eleven_points: see :func:`average_precision`.
    """
    classes = sorted({int(label) for picture in pictures for label in picture.labels[~picture.difficult]})
    by_threshold = {threshold: [] for threshold in THRESHOLDS}
    for label in classes:
        entries, objects = [], 0
        for picture in pictures:
            own = picture.labels == label
            truth, difficult = picture.boxes[own], picture.difficult[own]
            objects += int((~difficult).sum())
            detections = found.get(picture.id)
            if detections is None:
                continue
            chosen = detections["labels"] == label
            boxes = detections["boxes"][chosen]
            if len(truth) and len(boxes):
                best, which = box_iou(boxes, truth).max(1)
            else:
                best, which = torch.zeros(len(boxes)), torch.zeros(len(boxes), dtype=torch.long)
            rows = zip(detections["scores"][chosen].tolist(), best.tolist(), which.tolist(), strict=True)
            entries += [(-score, picture.id, overlap, n, difficult) for score, overlap, n in rows]
        entries.sort(key=lambda entry: entry[0])
        for threshold in THRESHOLDS:
            hits, taken = [], set()
            for _, id, overlap, which, difficult in entries:
                near = overlap > threshold / 100
                if near and difficult[which]:
                    continue
                hits.append(near and (id, which) not in taken)
                if near:
                    taken.add((id, which))
            by_threshold[threshold].append(average_precision(hits, objects, eleven_points))
    means = {threshold: 100 * float(np.mean(values or [0.0])) for threshold, values in by_threshold.items()}
    return {"AP50": means[50], "AP": float(np.mean(list(means.values()))), "AP75": means[75]}
