"""PEFD: align the pooled features behind an ensemble of projections.

Chen, Wang, Liu, Xu, de Hoog, Huang. Improved Feature Distillation via Projector Ensemble. NeurIPS 2022.
arXiv:2210.15274. Shapes: B images, D entries of the teacher's pooled features.

Each of ``PROJECTORS`` linear layers with a ReLU projects the student's pooled features to D entries. The mean of the
projections should point where the teacher's features point (:func:`pefd_loss`).

The authors have scripts for resnet32x4 -> resnet8x4 and for ResNet34 -> ResNet18 only, both with weight 25; other pairs
here have the same weight, which is our reading. Departs from the authors' code: its fourth projection, which nothing
uses, is not made; zero vectors, of which it has NaN, have a cosine of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, unit
from mdistiller.options import MANY, Option

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses, generator_kept

DEFAULTS = {
    "PROJECTORS": Option(3, "number of projections", at_least=1, at_most=MANY),
    "LOSS": feature_losses(25.0),
}
PAPER = "Chen et al., NeurIPS 2022, arXiv:2210.15274"


def pefd_loss(projections: list[Tensor], h_t: Tensor) -> Tensor:
    """``1 - cos(mean over projections of relu(P h_s), h_t)``, mean over the batch.

    Args:
        projections: ``P h_s`` ``(B, D)`` of each projection, before its ReLU; gradient flows.
        h_t: ``(B, D)``; constant.

    Returns:
        Scalar ``()`` in float32 or better, from 0 to 2.

    Raises:
        InputError: features of different shapes.

    Example:
        >>> h_t = torch.tensor([[1.0, 1.0]])
        >>> pefd_loss([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, -1.0]])], h_t)
        tensor(0.2929)
    """
    mean = sum(at_least_float32(projected).relu() for projected in projections) / len(projections)
    require_one_shape("pefd_loss", mean, h_t)
    return 1 - (unit(mean) * unit(at_least_float32(h_t.detach()))).sum(1).mean()


@register_distiller("PEFD", DEFAULTS, paper=PAPER, family="feature")
class PEFD(FeatureDistiller):
    """Directions of pooled features, behind several projections (:func:`pefd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.projectors = nn.ModuleList(nn.Linear(width_s, width_t) for _ in range(cfg.PEFD.PROJECTORS))

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        pooled = at_least_float32(features_student["pooled_feat"])
        with torch.autocast(pooled.device.type, enabled=False):
            return pefd_loss([project(pooled) for project in self.projectors], features_teacher["pooled_feat"])
