"""CWD: each channel of a map is a distribution over positions.

``WEIGHT * sum over levels of tau^2 / (B D) * sum KL(softmax(f_t / tau) || softmax(f_s / tau))`` over images and
channels, the softmax over positions (:func:`~mdistiller.functional.dense.cwd_loss`). Shu et al., ICCV 2021,
arXiv:2011.13256. Temperature 1 and weight 10 on five levels, without adapter, are mmrazor's for detectors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller.functional.dense import cwd_loss
from mdistiller.options import Option

from ._base import LEVELS, Direct, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {"TAU": Option(1.0, "temperature", above=0), **loss_weight(10.0), "LEVELS": LEVELS}
PAPER = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv:2011.13256"


@register_dense("CWD", DEFAULTS, paper=PAPER)
class CWD(Direct):
    """KL divergence of the channels' distributions over positions, summed over levels."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.tau, self.weight = own.TAU, own.WEIGHT

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        terms = [cwd_loss(s, t, self.tau) for s, t in self.pairs(student, teacher)]
        return {"loss_cwd": self.weight * sum(terms)}
