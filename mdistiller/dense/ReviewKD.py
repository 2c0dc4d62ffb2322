"""ReviewKD on the pyramid's maps, alone and with DKD.

``WEIGHT * sum over levels of hcl(r, f_t)``: from the deepest level to the finest, an attention-based fusion
(:class:`~mdistiller.distillers.ReviewKD.ABF`) merges the student's map with the result of the deeper level and
transforms it to the teacher's width; the hierarchical context loss
(:func:`~mdistiller.distillers.ReviewKD.hcl_loss`) compares the results with the teacher's maps. Chen et al., CVPR 2021,
arXiv:2104.09044. As in mdistiller's ``detection/`` there is no warm-up, and the weight is 1.2 for R18-R101, 1.0 for
R50-R101, 2.0 for MV2-R50.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers.ReviewKD import ABF, PAPER, hcl_loss
from mdistiller.options import WIDEST, Option

from . import DKD
from ._base import DenseMethod, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    **loss_weight(1.0),
    "MAX_MID_CHANNEL": Option(512, "largest width of the fusions", at_least=1, at_most=WIDEST),
}


@register_dense("REVIEWKD", DEFAULTS, paper=PAPER)
class ReviewKD(DenseMethod):
    """Knowledge review over the levels of the pyramid."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.weight = own.WEIGHT
        widths = list(zip(student.widths, teacher.widths, strict=True))[::-1]
        mid = min(own.MAX_MID_CHANNEL, max(student.widths))
        self.abfs = nn.ModuleList(ABF(s, mid, t, fuse=place > 0) for place, (s, t) in enumerate(widths))

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        results, deeper = [], None
        levels = zip(self.abfs, student.maps[::-1], teacher.maps[::-1], strict=True)
        for abf, level, like in levels:
            result, deeper = abf(level, deeper, like.shape[2:])
            results.append(result)
        return {"loss_reviewkd": self.weight * hcl_loss(results, teacher.maps[::-1])}


@register_dense("REVIEWKD_DKD", {**DEFAULTS, **DKD.DEFAULTS}, paper=f"{PAPER}; {DKD.PAPER}")
class ReviewKDAndDKD(ReviewKD):
    """The sum of ReviewKD and DKD."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.dkd = DKD.DKD(own, student, teacher)

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        return {**super().forward(student, teacher), **self.dkd(student, teacher)}
