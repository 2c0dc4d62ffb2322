"""VRM on the class logits of the sampled boxes, between a real and a virtual view.

``CE_VIRTUAL_WEIGHT * CE(virtual) + ALPHA * L_ISV + BETA * L_ICV`` beside the detector's own losses on the real view
(:func:`~mdistiller.distillers.VRM.vrm_loss`). Vertices are ``softmax(ZSNorm(adaptor(z)) / TEMPERATURE)`` of the boxes'
class logits, background included. Zhang et al., ICCV 2025.

The paper says nothing of how relations are taken in a detector. Readings: the vertices are the P sampled boxes of the
process; the virtual view differs in its colours only, so both views share the boxes; student and teacher each see both
views, so a step costs two passes of the student. Weights and options are those of
classification.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers.VRM import DEFAULTS as FOR_CLASSIFICATION
from mdistiller.distillers.VRM import PAPER, make_adaptor, vrm_loss
from mdistiller.functional import at_least_float32, zs_norm
from mdistiller.registry import InputError

from ._base import DenseMethod, compared, register_dense
from .record import DetectorFacts, Record

TAKEN = ("ALPHA", "BETA", "CE_VIRTUAL_WEIGHT", "TEMPERATURE", "ZSNORM", "ADAPTOR", "PRUNE_PERCENTILE", "EDGE_EPS")
DEFAULTS = {key: FOR_CLASSIFICATION[key] for key in TAKEN}


@register_dense("VRM", DEFAULTS, paper=PAPER)
class VRM(DenseMethod):
    """Relations between the boxes of two views, and between their classes."""

    virtual_view = True

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.alpha, self.beta, self.ce_weight = own.ALPHA, own.BETA, own.CE_VIRTUAL_WEIGHT
        self.temperature, self.zsnorm = own.TEMPERATURE, own.ZSNORM
        self.rules = {"prune_percentile": own.PRUNE_PERCENTILE, "edge_eps": own.EDGE_EPS}
        if self.zsnorm and student.classes < 2:
            raise InputError("DISTILLER.VRM.ZSNORM: with one class and background only their order is left; set False")
        self.adaptor = make_adaptor(own.ADAPTOR, student.classes + 1, teacher.classes + 1)

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        if not compared(student.class_logits):
            return {}
        views = (student.class_logits, student.virtual_logits)
        of_student = [self._vertices(self.adaptor(at_least_float32(z))) for z in views]
        of_teacher = [self._vertices(z) for z in (teacher.class_logits, teacher.virtual_logits)]
        between_boxes, between_classes = vrm_loss(*of_student, *of_teacher, **self.rules)
        return {
            "loss_ce_virtual": self.ce_weight * F.cross_entropy(at_least_float32(views[1]), student.labels),
            "loss_isv": self.alpha * between_boxes,
            "loss_icv": self.beta * between_classes,
        }

    def _vertices(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        return F.softmax((zs_norm(logits) if self.zsnorm else logits) / self.temperature, dim=1)
