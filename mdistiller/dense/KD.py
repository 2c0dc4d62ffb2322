"""KD on the class logits of the student's sampled boxes.

``WEIGHT * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, mean over all P sampled boxes of the process, background
included (:func:`~mdistiller.distillers.KD.kd_loss`). Hinton, Vinyals, Dean, arXiv:1503.02531; T 1 and weight 1 as in
DIST+'s table for COCO.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller.distillers.KD import PAPER, kd_loss
from mdistiller.options import Option

from ._base import DenseMethod, compared, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {"TEMPERATURE": Option(1.0, "divides the logits of both networks", above=0), **loss_weight(1.0)}


@register_dense("KD", DEFAULTS, paper=PAPER)
class KD(DenseMethod):
    """KL divergence of the class distributions of the sampled boxes."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.temperature, self.weight = own.TEMPERATURE, own.WEIGHT

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        if not compared(student.class_logits):
            return {}
        return {"loss_kd": self.weight * kd_loss(student.class_logits, teacher.class_logits, self.temperature)}
