"""The score of a detector: COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.processes import distributed
from mdistiller.engine.task import Measure, Score, Task
from mdistiller.registry import InputError

from . import voc
from .data import Pictures

MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first of COCOeval's stats
SIZES = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}  # areas in pixels, as COCOeval has them


class Detection(Task):
    """Average precision of boxes in percent: over IoU 0.5 to 0.95, at 0.5 and 0.75, of small, medium, large objects.

    A size of which the pictures hold no object is left out.

    Args:
        data: the pictures that are scored.
    """

    measures = tuple(Measure(name, name, name, digits=2) for name in MEASURES)

    def __init__(self, data: Pictures | None = None) -> None:
        self.data = data
        if data is not None:
            empty = {n for n, (low, high) in SIZES.items() if not any(low <= area <= high for area in data.areas)}
            self.measures = tuple(measure for measure in self.measures if measure.name not in empty)

    def evaluate(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        precision: Precision | None = None,
        on_batch: Callable[[], None] | None = None,
    ) -> Score:
        found: list[Any] = []
        batches = 0
        for targets, detections in predictions(network, loader, precision):
            found += [d for t, own in zip(targets, detections, strict=True) for d in self.detections_of(t, own)]
            batches += 1
            if on_batch is not None:
                on_batch()
        if on_batch is not None and batches * loader.share[1] < len(loader):  # others have a batch more
            on_batch()
        if distributed.world_size() > 1:
            found = [entry for part in distributed.gather_objects(found) for entry in part]
        scores = self.scores(found)
        values = {measure.name: scores[measure.name] for measure in self.measures}
        return Score(values[self.headline.name], values, len(self.data))

    def scores(self, found: list[Any]) -> dict[str, float]:
        """The measures of all that :meth:`detections_of` gave."""
        return coco_scores(self.data, found)

    def detections_of(self, target: dict[str, Any], detections: dict[str, Tensor]) -> list[Any]:
        """Detections ``boxes, labels, scores`` of a picture as COCO's results."""
        image = target["id"]
        boxes = detections["boxes"].cpu().clone()
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
        ids = self.data.category_ids
        return [{"image_id": image, "category_id": ids[n - 1], "bbox": box, "score": score} for box, n, score in rows]


class VOCDetection(Detection):
    """VOC's average precision in percent: at IoU 0.5 (the headline), over 0.5 to 0.95, at 0.75.

    The data set says whether precision is averaged at eleven recalls, as in 2007, or over all.
    """

    measures = tuple(Measure(name, name, name, digits=2) for name in ("AP50", "AP", "AP75"))

    def __init__(self, data: Pictures) -> None:
        self.data = data

    def detections_of(self, target: dict[str, Any], detections: dict[str, Tensor]) -> list[Any]:
        return [(target["id"], {name: value.cpu() for name, value in detections.items()})]

    def scores(self, found: list[Any]) -> dict[str, float]:
        return voc.scores(self.data.pictures, dict(found), self.data.metric == "voc07")


TASKS = {"coco": Detection, "voc07": VOCDetection, "voc": VOCDetection}


def task_of(data: Pictures) -> Detection:
    """The task that scores a data set as its makers do."""
    return TASKS[data.metric](data)


@torch.no_grad()
def predictions(network: nn.Module, loader: Iterable[Any], precision: Precision | None = None) -> Any:
    """Targets and detections of each batch, the network in eval mode. Its mode is restored."""
    precision = precision or Precision(device=next(network.parameters()).device)
    was_training = network.training
    network.eval()
    try:
        for batch in loader:
            images = [image.to(precision.device).float() / 255 for image in batch["image"]]
            with precision.autocast(), torch.compiler.set_stance("force_eager"):
                detections = network(images)
            yield batch["target"], detections
    finally:
        network.train(was_training)


def coco_scores(data: Pictures, found: list[dict[str, Any]]) -> dict[str, float]:
    """The measures of results in COCO's form; 0 for no detection.

    Raises:
        InputError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise InputError('scoring detectors needs pycocotools: pip install -e ".[detection]"') from None
    with contextlib.redirect_stdout(io.StringIO()):  # which pycocotools fills
        truth = COCO(str(data.annotations))
        if not found:
            return dict.fromkeys(MEASURES, 0.0)
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.params.imgIds = [picture.id for picture in data.pictures]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(MEASURES, evaluation.stats, strict=False)}
