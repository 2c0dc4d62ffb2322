"""SDD: scale decoupled distillation, logits of regions of the image.

Wei, Luo, Luo. Scale Decoupled Distillation. CVPR 2024. arXiv:2403.13512. Shapes: B images, K classes, N regions.

The map before the classifier is pooled to the cells of a pyramid (``SCALES``: 1, 2x2, 4x4), and the classifier of each
network gives the logits of each cell. A logit distillation (KD, DKD or NKD: ``SDD_KD``, ``SDD_DKD``, ``SDD_NKD``)
compares the networks in each region. A region counts double if the teacher's prediction there is right and that for the
whole image is wrong, or the reverse; the loss is the sum over images and regions divided by ``B N`` (:func:`sdd_loss`).
``SCALES [1]`` is the plain distillation.

Departs from the authors' code: the whole image's logits are the networks' own, also for maps whose side is no multiple
of 4 (there the code weighs positions unevenly); NaN is not replaced by 0, since the losses have none; SDD_NKD leaves
the target out of the other classes, as NKD does (``TARGET_AMONG_OTHERS True``: as published).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import gradient_in_layout, require_one_shape, require_same_images
from mdistiller.functional.mixing import class_numbers
from mdistiller.models._features import pooled_map
from mdistiller.options import MANY, Option, weight

from ._base import Distiller, register_distiller
from ._common import logit_losses, warmup
from .DKD import dkd_loss
from .KD import kd_loss
from .NKD import nkd_loss

FINEST = 4  # cells of a side; coarser cells are means of these

SCALES = Option(
    (1, 2, 4),
    "cells along a side of the image, 1 and perhaps 2 and 4",
    holds=(lambda scales: tuple(scales) in ((1,), (1, 2), (1, 2, 4)), "[1], [1, 2] or [1, 2, 4]"),
)
TEMPERATURE = Option(4.0, "the temperature", above=0)
WARMUP = Option(20, "epochs in which the loss's weight rises linearly", at_least=0, at_most=MANY)
KD_DEFAULTS = {"SCALES": SCALES, "T": TEMPERATURE, "LOSS": logit_losses(0.9, ce_weight=0.1)}
DKD_DEFAULTS = {
    "SCALES": SCALES,
    "T": TEMPERATURE,
    "ALPHA": weight(1.0, "of the target class's term"),
    "BETA": weight(8.0, "of the other classes' term"),
    "WARMUP": WARMUP,
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
}
NKD_DEFAULTS = {
    "SCALES": SCALES,
    "T": Option(1.0, "temperature of the other classes' part", above=0),
    "GAMMA": Option(1.5, "weight of the other classes' part", at_least=0),
    "TARGET_AMONG_OTHERS": Option(False, "the target is one of the other classes, as in the authors' code"),
    "WARMUP": WARMUP,
    "LOSS": logit_losses(1.0),
}
PAPER = "Wei et al., CVPR 2024, arXiv:2403.13512"

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def region_features(maps: Tensor, scales: Sequence[int]) -> Tensor:
    """``(B, D, N)``: means of the map's cells, for each scale row by row. Cells of 2x2 are means of those of 4x4.

    Args:
        maps: ``(B, D, H, W)``; gradient flows.
        scales: cells along a side; 1 is the mean of the map.
    """
    finest = F.adaptive_avg_pool2d(maps, FINEST)
    whole = {1: maps.mean((2, 3), keepdim=True)}
    return torch.cat([whole.get(scale, F.adaptive_avg_pool2d(finest, scale)).flatten(2) for scale in scales], dim=2)


def sdd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, each: RowLoss) -> Tensor:
    """``sum over images and regions of w * each(z_s, z_t, y) / (B N)``.

    w is 2 if exactly one of the teacher's predictions, for the region and for the whole image, is the target; else 1.

    Args:
        logits_student: ``(B, K, N)`` of the regions, the whole image first; gradient flows.
        logits_teacher: ``(B, K, N)``.
        target: ``(B,)`` class numbers, or ``(B, K)`` shares; the largest share counts.
        each: the loss of rows of logits ``(M, K)``, ``(M, K)`` and targets ``(M,)``: ``(M,)``.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: logits of different shapes, or a different number of targets.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
        >>> sdd_loss(student, teacher, torch.tensor([0]), lambda s, t, y: kd_loss(s, t, 4.0, reduce=False))
        tensor(2.6627)
    """
    require_one_shape("sdd_loss", logits_student, logits_teacher)
    require_same_images("sdd_loss", logits_student, target)
    target = class_numbers(target)
    right = logits_teacher.argmax(1) == target[:, None]
    weights = 1 + (right != right[:, :1]).to(torch.float32)
    regions = logits_student.shape[2]
    rows_s, rows_t = (logits.transpose(1, 2).flatten(0, 1) for logits in (logits_student, logits_teacher))
    return (weights.flatten() * each(rows_s, rows_t, target.repeat_interleave(regions))).mean()


class SDD(Distiller):
    """A logit distillation in regions of the image (:func:`sdd_loss`). Sub-classes define ``each``."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg[self.section]
        losses = self.own.get("LOSS", self.own)
        self.ce_weight, self.kd_weight = losses.CE_WEIGHT, losses.get("KD_WEIGHT", 1.0)
        for facts in self.network_facts(cfg):
            facts.need("pooled_map")
            facts.need("classifier")

    def each(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        """The loss ``(M,)`` of rows of logits ``(M, K)`` and class numbers ``(M,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of a region")

    def regions(self, role: str, logits: Tensor, features: dict[str, Any]) -> Tensor:
        """Logits ``(B, K, N)`` of the regions; those of the whole image are the network's."""
        scales = tuple(self.own.SCALES)[1:]
        if not scales:
            return logits[:, :, None]
        facts = self.student_facts if role == "student" else self.teacher_facts
        classifier = getattr(self, role).get_submodule(facts.classifier)
        cells = region_features(gradient_in_layout(pooled_map(features)), scales)
        rows = classifier(cells.transpose(1, 2).flatten(0, 1))
        of_cells = rows.view(len(logits), -1, logits.shape[1]).transpose(1, 2)
        return torch.cat([logits[:, :, None], of_cells.to(logits.dtype)], dim=2)

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        of_student = self.regions("student", logits_student, features_student)
        with torch.no_grad():
            of_teacher = self.regions("teacher", *self.teacher(image))
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.kd_weight
            * warmup(epoch, self.own.get("WARMUP", 0))
            * sdd_loss(of_student, of_teacher, target, self.each),
        }


@register_distiller("SDD_KD", KD_DEFAULTS, paper=PAPER, family="logit")
class SDDKD(SDD):
    """KD in regions of the image (:func:`sdd_loss`)."""

    def each(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        return kd_loss(logits_student, logits_teacher, self.own.T, reduce=False)


@register_distiller("SDD_DKD", DKD_DEFAULTS, paper=PAPER, family="logit")
class SDDDKD(SDD):
    """DKD in regions of the image (:func:`sdd_loss`)."""

    def each(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        own = self.own
        return dkd_loss(logits_student, logits_teacher, target, own.ALPHA, own.BETA, own.T, reduce=False)


@register_distiller("SDD_NKD", NKD_DEFAULTS, paper=PAPER, family="logit")
class SDDNKD(SDD):
    """NKD in regions of the image (:func:`sdd_loss`)."""

    def each(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        own = self.own
        given = logits_student, logits_teacher, target, own.GAMMA, own.T, own.TARGET_AMONG_OTHERS
        return nkd_loss(*given, reduce=False)
