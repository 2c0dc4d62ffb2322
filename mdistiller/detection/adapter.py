"""torchvision's detectors as records: a student's step, and its teacher's view of the same boxes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from mdistiller.dense import DetectorFacts, Record
from mdistiller.dense.record import background_last, labels_background_last, within
from mdistiller.registry import InputError

Sizes = list[tuple[int, int]]


def facts_of(detector: FasterRCNN) -> DetectorFacts:
    """Classes, levels, strides and widths of a detector; its backbone is run on a black picture of 128 pixels."""
    was_training = detector.training
    detector.eval()
    device = next(detector.parameters()).device
    with torch.no_grad():
        maps = list(detector.backbone(torch.zeros(1, 3, 128, 128, device=device)).values())
    detector.train(was_training)
    head = detector.roi_heads.box_predictor.cls_score
    return DetectorFacts(
        classes=head.out_features - 1,
        strides=tuple(128 // f.shape[3] for f in maps),
        widths=tuple(f.shape[1] for f in maps),
        class_head=head,
    )


def check_pair(student: DetectorFacts, teacher: DetectorFacts) -> None:
    """Refuse a teacher that does not see what the student sees.

    Raises:
        InputError: other classes, levels or strides.
    """
    if student.classes != teacher.classes:
        raise InputError(
            f"the teacher has {teacher.classes} classes, the student {student.classes}; take a teacher trained "
            "on the same classes (MODEL.ROI_HEADS.NUM_CLASSES)"
        )
    if student.strides != teacher.strides:
        raise InputError(
            f"the levels of the teacher's pyramid have strides {teacher.strides}, those of the student's "
            f"{student.strides}; both need the same"
        )


def student_pass(
    student: FasterRCNN, images: list[Tensor], targets: list[dict[str, Tensor]], virtual: bool = False
) -> tuple[Record, dict[str, Tensor], ImageList]:
    """A training step of a detector, with the losses of torchvision's own ``forward``, bit for bit.

    Args:
        student: in training mode.
        images: ``(3, H, W)`` each, red first, 0 to 1.
        targets: of each picture ``boxes`` ``(G, 4)`` corners in pixels and ``labels`` ``(G,)`` from 1.
        virtual: also run it on a view with other colours.

    Returns:
        The record, torchvision's losses, and the padded batch that the network saw.
    """
    heads = student.roi_heads
    batch, targets = student.transform(images, targets)
    maps = student.backbone(batch.tensors)
    with _rpn_output(student) as of_rpn:
        proposals, rpn_losses = student.rpn(batch, maps, targets)
    boxes, _, labels, deltas = heads.select_training_samples(proposals, targets)
    class_logits, box_deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, batch.image_sizes)))
    of_class, of_box = fastrcnn_loss(class_logits, box_deltas, labels, deltas)
    levels = list(maps.values())
    record = Record(
        maps=levels,
        class_logits=background_last(class_logits),
        box_deltas=box_deltas[:, 4:],
        boxes=boxes,
        labels=labels_background_last(torch.cat(labels), class_logits.shape[1] - 1),
        truth=[target["boxes"] for target in targets],
        rpn_logits=of_rpn[0],
        rpn_deltas=of_rpn[1],
        anchors=_anchors(student, batch, levels),
        virtual_logits=None,
    )
    losses = {"loss_classifier": of_class, "loss_box_reg": of_box, **rpn_losses}
    return record, losses, batch


def boxes_pass(detector: FasterRCNN, batch: ImageList, boxes: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Maps, class logits (background last) and box deltas of a detector on given boxes, without proposals."""
    heads = detector.roi_heads
    maps = detector.backbone(batch.tensors)
    features = heads.box_head(heads.box_roi_pool(maps, boxes, batch.image_sizes))
    class_logits, box_deltas = heads.box_predictor(features)
    return list(maps.values()), background_last(class_logits), box_deltas[:, 4:]


def teacher_pass(teacher: FasterRCNN, batch: ImageList, student: Record) -> Record:
    """The teacher's record on the student's boxes. Gradient flows to its box predictor's trained parameters only."""
    heads = teacher.roi_heads
    with torch.no_grad():
        maps = teacher.backbone(batch.tensors)
        features = heads.box_head(heads.box_roi_pool(maps, student.boxes, batch.image_sizes))
    class_logits, box_deltas = heads.box_predictor(features)  # frozen, but for what the method trains
    return Record(
        maps=list(maps.values()),
        class_logits=background_last(class_logits),
        box_deltas=box_deltas[:, 4:],
        boxes=student.boxes,
        labels=student.labels,
        truth=student.truth,
        anchors=student.anchors,
    )


def pixels(detector: FasterRCNN, batch: ImageList) -> Tensor:
    """The pictures of a normalised batch ``(B, 3, H, W)``: red first, 0 to 1, padded with 0."""
    mean, std, blue_first = _statistics(detector, batch.tensors)
    image = batch.tensors * std + mean
    return within(image.flip(1) if blue_first else image, batch.image_sizes)


def normalised(detector: FasterRCNN, image: Tensor, sizes: Sizes) -> ImageList:
    """Pictures ``(B, 3, H, W)``, red first, 0 to 1, as a detector's batch; the padding is 0."""
    mean, std, blue_first = _statistics(detector, image)
    image = ((image.flip(1) if blue_first else image) - mean) / std
    return ImageList(within(image, sizes), sizes)


def seen_by(other: FasterRCNN, detector: FasterRCNN, batch: ImageList) -> ImageList:
    """The batch of ``detector`` in the statistics and the order of channels of ``other``; the same pixels."""
    if same_input(other, detector):
        return batch
    return normalised(other, pixels(detector, batch), batch.image_sizes)


def same_input(a: FasterRCNN, b: FasterRCNN) -> bool:
    keys = ("image_mean", "image_std", "blue_first")
    return all(getattr(a.transform, key, False) == getattr(b.transform, key, False) for key in keys)


def other_colours(image: Tensor, strength: float = 0.4) -> Tensor:
    """A virtual view: brightness, contrast and saturation of each picture times a factor in ``1 +- strength``.

    Args:
        image: ``(B, 3, H, W)``, 0 to 1. Nothing moves, so boxes stay.
        strength: largest relative change.
    """
    factors = 1 + strength * (2 * torch.rand(3, len(image), 1, 1, 1) - 1)
    brightness, contrast, saturation = factors.to(image.device)
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)[:, None, None]
    image = (brightness * image).clamp(0, 1)
    grey = (image * weights).sum(1, keepdim=True)
    image = (grey.mean((2, 3), keepdim=True) * (1 - contrast) + contrast * image).clamp(0, 1)
    grey = (image * weights).sum(1, keepdim=True)
    return (grey + saturation * (image - grey)).clamp(0, 1)


def _statistics(detector: FasterRCNN, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    given = detector.transform
    mean, std = (torch.as_tensor(x).to(like)[:, None, None] for x in (given.image_mean, given.image_std))
    return mean, std, getattr(given, "blue_first", False)


@contextmanager
def _rpn_output(detector: FasterRCNN) -> Any:
    """The logits and deltas of the region proposal network, level by level."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        for kept, part in zip(found, output, strict=True):
            kept[:] = part

    handle = detector.rpn.head.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _anchors(detector: FasterRCNN, batch: ImageList, maps: list[Tensor]) -> list[Tensor]:
    """``(H W A, 4)`` for each level; the same for all pictures."""
    generator = detector.rpn.anchor_generator
    one = generator(ImageList(batch.tensors[:1], batch.image_sizes[:1]), maps)[0]
    counts = [f.shape[2] * f.shape[3] * a for f, a in zip(maps, generator.num_anchors_per_location(), strict=True)]
    return list(one.split(counts))
