"""Mimic: the student's maps, after a 1x1 convolution, imitate the teacher's.

``WEIGHT * sum over levels of mean((align(f_s) - f_t)^2)``, the mean over all entries of a level. Form, weight 1 and
five levels are those of MasKD's code for DIST+'s tables; the convolution has a bias and stands there for equal widths
too.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mdistiller.functional import at_least_float32

from ._base import LEVELS, Aligned, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {**loss_weight(1.0), "LEVELS": LEVELS}
PAPER = "Huang et al., Masked Distillation with Receptive Tokens (code), arXiv:2205.14589"


@register_dense("MIMIC", DEFAULTS, paper=PAPER)
class Mimic(Aligned):
    """Mean squared error of aligned maps, summed over levels."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.weight = own.WEIGHT

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        terms = [F.mse_loss(at_least_float32(s), at_least_float32(t)) for s, t in self.pairs(student, teacher)]
        return {"loss_mimic": self.weight * sum(terms)}
