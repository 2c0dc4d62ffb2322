"""DKD on the class logits of the student's sampled boxes.

``T^2 * (ALPHA * TCKD + BETA * NCKD)``, mean over all P sampled boxes of the process
(:func:`~mdistiller.distillers.DKD.dkd_loss`). The target is the box's label; background is a class like any other, so
for most boxes TCKD is about background. Zhao et al., arXiv:2203.08679; ALPHA 1, BETA 0.25 and T 1 as in mdistiller's
``detection/``, without warm-up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller.distillers.DKD import PAPER, dkd_loss
from mdistiller.options import Option, weight

from ._base import DenseMethod, compared, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    "ALPHA": weight(1.0, "of the target class's term"),
    "BETA": weight(0.25, "of the other classes' term"),
    "T": Option(1.0, "the temperature", above=0),
}


@register_dense("DKD", DEFAULTS, paper=PAPER)
class DKD(DenseMethod):
    """Decoupled KD of the class distributions of the sampled boxes."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.alpha, self.beta, self.temperature = own.ALPHA, own.BETA, own.T

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        if not compared(student.class_logits):
            return {}
        logits = student.class_logits, teacher.class_logits
        return {"loss_dkd": dkd_loss(*logits, student.labels, self.alpha, self.beta, self.temperature)}
