"""SimKD: regress the map that the teacher pools, and predict by the teacher's classifier.

Chen, Mei, Zhang, Wang, Feng, Chen. Knowledge Distillation with the Reused Teacher Classifier. CVPR 2022.
arXiv:2203.14001. Shapes: B images, C channels, H, W positions.

A projector takes the student's last map to the shape of the teacher's: 1x1, 3x3 and 1x1 convolution, each with batch
norm and ReLU, ``FACTOR`` times narrower inside than the teacher's map. The loss is the mean squared difference. The
teacher's classifier predicts from the pooled result, in training and afterwards: the deployed network is student,
projector and classifier. The labels are not used (``LOSS.CE_WEIGHT`` 0); with a weight the student's own classifier
learns from them, and no prediction depends on it. ``DISTILLER.ADD_KD`` teaches this classifier too.

The teacher's map is the map that its classifier sees, which is our reading: behind the ReLU in WRN, whose stages end
before it. The paper's table has ``FACTOR`` 8, 4 and 2, the authors' script 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, pool_to_common, require_one_shape, spatial_mean
from mdistiller.models._features import pooled_map
from mdistiller.options import WIDEST, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import generator_kept

DEFAULTS = {
    "FACTOR": Option(2, "the teacher's width over the projector's inner width", at_least=1, at_most=WIDEST),
    "LOSS": {
        "CE_WEIGHT": weight(0.0, "of the cross-entropy of the student's own classifier, which predicts nothing"),
        "FEAT_WEIGHT": weight(1.0, "of the distance of the features"),
    },
}
PAPER = "Chen et al., CVPR 2022, arXiv:2203.14001"


def simkd_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """``(P(F_s) - F_t)^2``, mean over all entries.

    Args:
        f_s: ``(B, C, H, W)``, the projected map; gradient flows.
        f_t: ``(B, C, H, W)``; constant.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> simkd_loss(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
        tensor(1.)
    """
    require_one_shape("simkd_loss", f_s, f_t)
    return F.mse_loss(at_least_float32(f_s), at_least_float32(f_t.detach()))


def projector(width_s: int, width_t: int, factor: int = 2) -> nn.Sequential:
    """Three convolutions without bias, each with batch norm and ReLU, from ``width_s`` to ``width_t`` channels."""
    inner = max(width_t // factor, 1)
    layers: list[nn.Module] = []
    for width_in, width_out, kernel in ((width_s, inner, 1), (inner, inner, 3), (inner, width_t, 1)):
        conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(width_out), nn.ReLU()]
    return nn.Sequential(*layers)


class Predictor(nn.Module):
    """Student, projector and the teacher's classifier: images ``(B, 3, H, W)`` to logits ``(B, K)``.

    Args:
        student: returns ``(logits, features)``.
        projector: of the student's last map.
        classifier: of the projected map's mean.
        side: ``(H, W)`` of the teacher's map; a larger map of the student is average-pooled first.
    """

    def __init__(self, student: nn.Module, projector: nn.Module, classifier: nn.Module, side: torch.Size) -> None:
        super().__init__()
        self.student, self.projector, self.classifier, self.side = student, projector, classifier, side

    def forward(self, image: Tensor) -> Tensor:
        maps = self.student(image)[1]["feats"][-1]
        return self.head(maps)[1]

    def head(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The projected map and the logits, of the student's last map."""
        side = tuple(min(pair) for pair in zip(maps.shape[2:], self.side, strict=True))
        if maps.shape[2:] != side:
            maps = F.adaptive_avg_pool2d(maps, side)
        projected = self.projector(maps)
        return projected, self.classifier(spatial_mean(projected))


@register_distiller("SIMKD", DEFAULTS, paper=PAPER, family="feature")
class SimKD(Distiller):
    """Regression of the teacher's last map; its classifier predicts (:func:`simkd_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.ce_weight, self.feat_weight = cfg.SIMKD.LOSS.CE_WEIGHT, cfg.SIMKD.LOSS.FEAT_WEIGHT
        of_student, of_teacher = self.network_facts(cfg)
        _, width_t, *self.side = of_teacher.need("pooled_map")
        self.classifier_name = of_teacher.need("classifier")
        if not isinstance(self.classifier, nn.Linear):
            raise InputError(f"SIMKD: the classifier of the {of_teacher} is no nn.Linear; choose another teacher")
        with generator_kept():
            self.projector = projector(of_student.channels[-1], width_t, cfg.SIMKD.FACTOR)

    @property
    def classifier(self) -> nn.Module:
        return self.teacher.get_submodule(self.classifier_name)

    def deployed(self) -> Predictor:
        """Student, projector and classifier; no other network has a trained classifier."""
        return Predictor(self.student, self.projector, self.classifier, torch.Size(self.side))

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        own_logits, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        projected, logits = self.deployed().head(features_student["feats"][-1])
        distance = simkd_loss(*pool_to_common(gradient_in_layout(projected), pooled_map(features_teacher)))
        return logits, {
            "loss_ce": self.ce_weight * F.cross_entropy(own_logits, target),
            "loss_kd": self.feat_weight * distance,
        }
