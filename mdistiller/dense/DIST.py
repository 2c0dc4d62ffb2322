"""DIST and DIST+ on the class logits of the sampled boxes and on the pyramid's maps.

DIST: ``INTER_WEIGHT * L_inter + INTRA_WEIGHT * L_intra`` of ``softmax(z / TAU)`` over all P sampled boxes of the
process, background included (:func:`~mdistiller.distillers.DIST.dist_loss`). Weights 1 and 1, no temperature and no
factor ``TAU^2``, as in the authors' code for detectors. Huang et al., arXiv:2205.10536.

DIST+ adds, for each level, the distance of the maps along channels and over positions
(:func:`~mdistiller.distillers.DIST.feature_relation_loss`), and acclimates the teacher's class head
(:func:`~mdistiller.distillers.DIST.acclimation_loss`). There is no public code for DIST+. Readings: the terms are
summed over levels, as the mimic loss is; all weights are 1; a level of one position has no term over positions; the
class head alone is acclimated, since the box head has no convolution; its rate and the distance from its start are
bounded as in classification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers.DIST import (
    EPS,
    PAPER,
    PLUS_PAPER,
    acclimation_loss,
    channel_relation_loss,
    dist_loss,
    feature_relation_loss,
    hold_within,
)
from mdistiller.options import Option, weight

from ._base import LEVELS, DenseMethod, compared, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    "TAU": Option(1.0, "temperature", above=0),
    "INTER_WEIGHT": weight(1.0, "of L_inter"),
    "INTRA_WEIGHT": weight(1.0, "of L_intra"),
}
PLUS_DEFAULTS = {
    **DEFAULTS,
    "CHANNEL_WEIGHT": weight(1.0, "of the maps along channels"),
    "SPATIAL_WEIGHT": weight(1.0, "of the maps over positions"),
    "ACCLIMATE_WEIGHT": weight(1.0, "of the teacher's loss; 0: the teacher stays as it is"),
    "ACCLIMATE_LR": Option(0.0, "the class head's learning rate; 0: a hundredth of SOLVER.BASE_LR", at_least=0),
    "ACCLIMATE_RADIUS": Option(
        0.02, "largest distance of a weight from its start, as a share of its length; 0: no bound", at_least=0
    ),
    "LEVELS": LEVELS,
}


@register_dense("DIST", DEFAULTS, paper=PAPER)
class DIST(DenseMethod):
    """Pearson correlation of the boxes' class distributions, along rows and columns."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.tau, self.inter, self.intra = own.TAU, own.INTER_WEIGHT, own.INTRA_WEIGHT

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        if not compared(student.class_logits):
            return {}
        inter, intra = dist_loss(student.class_logits, teacher.class_logits, self.tau, eps=EPS)
        return {"loss_inter": self.inter * inter, "loss_intra": self.intra * intra}


@register_dense("DIST_PLUS", PLUS_DEFAULTS, paper=PLUS_PAPER)
class DISTPlus(DIST):
    """DIST, relations of the maps of each level, and a teacher whose class head learns from the student."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.count = self.levels(own, student, teacher)
        self.channel_weight, self.spatial_weight = own.CHANNEL_WEIGHT, own.SPATIAL_WEIGHT
        self.acclimate_weight, self.rate, self.radius = own.ACCLIMATE_WEIGHT, own.ACCLIMATE_LR, own.ACCLIMATE_RADIUS
        widths = zip(student.widths[: self.count], teacher.widths[: self.count], strict=True)
        self.align = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in widths)
        if self.acclimate_weight:
            self.acclimated = teacher.class_head.requires_grad_(True)  # part of this module: optimised and saved
            for name, parameter in self.acclimated.named_parameters():
                self.register_buffer(f"start_{name}", parameter.detach().clone(), persistent=False)

    def parameter_rates(self, rate: float) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(self.acclimated.parameters()), self.rate or 0.01 * rate)] if self.acclimate_weight else []

    @torch.no_grad()
    def hold_teacher(self) -> None:
        """Take weights beyond ``ACCLIMATE_RADIUS`` back to that distance from their start. Called before each step."""
        if self.acclimate_weight and self.radius:
            for name, parameter in self.acclimated.named_parameters():
                hold_within(parameter, self.get_buffer(f"start_{name}"), self.radius)

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        losses, channel, spatial = super().forward(student, teacher), 0.0, 0.0
        for align, f_s, f_t in zip(self.align, student.maps, teacher.maps, strict=False):
            f_s = align(f_s)
            if f_s.shape[2] * f_s.shape[3] > 1:
                terms = feature_relation_loss(f_s, f_t, eps=EPS)
                channel, spatial = channel + terms[0], spatial + terms[1]
            else:
                channel = channel + channel_relation_loss(f_s, f_t, eps=EPS)
        losses["loss_channel"] = self.channel_weight * channel
        losses["loss_spatial"] = self.spatial_weight * torch.as_tensor(spatial, device=student.maps[0].device)
        if self.acclimate_weight and compared(student.class_logits):
            loss = acclimation_loss(student.class_logits, teacher.class_logits, student.labels, self.tau, eps=EPS)
            losses["loss_acclimation"] = self.acclimate_weight * loss
        return losses
