"""PKD: Pearson's correlation of the maps' channels.

``WEIGHT * sum over levels of 1/2 mean((x_s - x_t)^2)`` of the maps ``x`` standardised for each channel over images and
positions (:func:`~mdistiller.functional.dense.pkd_loss`). Cao et al., NeurIPS 2022, arXiv:2207.02039. Weight 6 on the
four finest levels is mmrazor's for Faster R-CNN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller.functional.dense import pkd_loss
from mdistiller.options import Option

from ._base import Direct, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    **loss_weight(6.0),
    "LEVELS": Option(4, "number of the pyramid's levels, from the finest; 0: all", at_least=0, at_most=16),
}
PAPER = "Cao et al., PKD: General Distillation Framework for Object Detectors, NeurIPS 2022, arXiv:2207.02039"


@register_dense("PKD", DEFAULTS, paper=PAPER)
class PKD(Direct):
    """Half the mean squared difference of standardised channels, summed over levels."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.weight = own.WEIGHT

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        terms = [pkd_loss(s, t) for s, t in self.pairs(student, teacher)]
        return {"loss_pkd": self.weight * sum(terms)}
