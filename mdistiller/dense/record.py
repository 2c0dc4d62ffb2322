"""What a detector leaves of a step, in one form for every engine; the methods see nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Record:
    """A detector's pass over a batch. B pictures, L levels, P sampled boxes in all pictures, C classes.

    Coordinates are pixels of the padded batch. Background is the last class.

    Args:
        maps: the pyramid's maps, the finest first: ``(B, D, H, W)`` for each level.
        class_logits: ``(P, C + 1)``.
        box_deltas: ``(P, 4 C)``, class by class, or ``(P, 4)``.
        boxes: the sampled boxes of each picture, ``(P_b, 4)`` corners; P is their sum.
        labels: of the sampled boxes, ``(P,)`` from 0; C is background.
        truth: the true boxes of each picture, ``(G_b, 4)`` corners.
        rpn_logits: of each level ``(B, A, H, W)``; empty for a teacher, whose region proposals nothing needs.
        rpn_deltas: of each level ``(B, 4 A, H, W)``; empty for a teacher.
        anchors: of each level ``(H W A, 4)`` corners, the same for all pictures.
        virtual_logits: ``(P, C + 1)`` on the same boxes of the virtual view, if the method asks for that view.
    """

    maps: list[Tensor]
    class_logits: Tensor
    box_deltas: Tensor
    boxes: list[Tensor]
    labels: Tensor
    truth: list[Tensor]
    rpn_logits: list[Tensor] = field(default_factory=list)
    rpn_deltas: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    virtual_logits: Tensor | None = None


@dataclass(frozen=True)
class DetectorFacts:
    """What a method may ask of a detector when it is built.

    Args:
        classes: C, without background.
        strides: pixels from one position to the next, for each level, the finest first.
        widths: D of each level.
        class_head: the layer that gives ``Record.class_logits``.
    """

    classes: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    class_head: nn.Module


def background_last(columns: Tensor) -> Tensor:
    """Logits ``(P, 1 + C)`` whose first column is background, with that column at the end."""
    return torch.roll(columns, -1, 1)


def labels_background_last(labels: Tensor, classes: int) -> Tensor:
    """Labels 0 (background) to C as labels 0 to C - 1 and C (background)."""
    return (labels + classes) % (classes + 1)


def within(tensor: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """``tensor`` ``(B, C, H, W)`` with zeros beyond each picture's height and width: the padding of a batch."""
    rows, columns = (torch.arange(n, device=tensor.device) for n in tensor.shape[2:])
    heights, widths = torch.tensor(sizes, device=tensor.device).unbind(1)
    inside = (rows < heights[:, None])[:, None, :, None] & (columns < widths[:, None])[:, None, None, :]
    return torch.where(inside, tensor, 0.0)
