"""FGFI: the student imitates the teacher's maps near the objects.

``WEIGHT / (2 N) * sum over levels, masked positions and channels of (relu(conv(f_s)) - f_t)^2``; N is the number of
masked positions in the batch. A position is masked if one of its anchors has an IoU with a true box above ``THRESHOLD``
times the box's best IoU (:func:`~mdistiller.functional.dense.fgfi_masks`). Wang et al., CVPR 2019, arXiv:1906.03609.
The 3x3 convolution starts from N(0, 1e-4), truncated at two deviations; weight 0.01 and 400 steps without the loss are
the authors' code's.

The paper has one map. Readings for a pyramid: each level has a mask and a convolution of its own, a box's best IoU is
over all levels, one N for all levels, and the loss is 0 for an empty mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional.dense import fgfi_loss, fgfi_masks
from mdistiller.options import MANY, Option

from ._base import LEVELS, DenseMethod, StepCount, loss_weight, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    **loss_weight(0.01),
    "THRESHOLD": Option(0.5, "share of a box's best IoU", at_least=0, below=1),
    "WARMUP_ITERS": Option(400, "number of steps before the loss begins", at_least=0, at_most=MANY),
    "LEVELS": LEVELS,
}
PAPER = "Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019, arXiv:1906.03609"


@register_dense("FGFI", DEFAULTS, paper=PAPER)
class FGFI(DenseMethod):
    """Squared error of maps at the positions near true boxes."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.weight, self.threshold, self.warmup = own.WEIGHT, own.THRESHOLD, own.WARMUP_ITERS
        self.count = self.levels(own, student, teacher)
        widths = list(zip(student.widths, teacher.widths, strict=True))[: self.count]
        self.adapt = nn.ModuleList(nn.Conv2d(s, t, 3, padding=1) for s, t in widths)
        for conv in self.adapt:
            nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)
            nn.init.zeros_(conv.bias)
        self.steps = StepCount()

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        begun = self.steps() >= self.warmup
        adapted = [conv(f).relu() for conv, f in zip(self.adapt, student.maps, strict=False)]
        sizes = [tuple(f.shape[2:]) for f in adapted]
        masks = fgfi_masks(student.anchors[: self.count], sizes, student.truth, self.threshold)
        loss = fgfi_loss(adapted, teacher.maps[: self.count], masks)
        return {"loss_fgfi": self.weight * torch.where(begun, loss, 0.0 * loss)}
