"""SRRL: the teacher's classifier on the student's features gives the teacher's logits.

Yang, Martinez, Bulat, Tzimiropoulos. Knowledge Distillation via Softmax Regression Representation Learning. ICLR 2021.
Shapes: B images, D entries of the teacher's pooled features h_t, K classes.

A connector (1x1 convolution, batch norm, ReLU) takes the student's last map to the teacher's width; its mean over the
positions is h_s. The frozen classifier of the teacher gives the logits ``c(h_s)``.

- feature matching: ``||h_s - h_t||^2 / D``;
- softmax regression: ``||c(h_s) - z_t||^2 / K``.

As in the authors' code for ImageNet. In the code of SimKD, the connector takes the student's pooled features
(``CONNECTOR pooled``), and KD with weight 1 is added (``DISTILLER.ADD_KD 1.0``); the code of cls_KD weights the second
term with 5 on CIFAR-100. The teacher's side is the classifier's input; it differs from the mean of the last map in
networks that have a layer between both (WRN).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_one_shape, spatial_mean
from mdistiller.options import Option, weight

from ._base import Distiller, register_distiller

DEFAULTS = {
    "CONNECTOR": Option("map", "what the connector takes: the last map, or the pooled features",
                        one_of=("map", "pooled")),
    "LOSS": {
        "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
        "FEAT_WEIGHT": weight(1.0, "of the distance of the pooled features"),
        "LOGIT_WEIGHT": weight(1.0, "of the distance of the logits"),
    },
}  # fmt: skip
PAPER = "Yang et al., ICLR 2021"


def srrl_losses(pooled_s: Tensor, pooled_t: Tensor, logits_s: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
    """``mean((h_s - h_t)^2)`` and ``mean((c(h_s) - z_t)^2)``, over all entries.

    Args:
        pooled_s: ``(B, D)``, behind the connector; gradient flows.
        pooled_t: ``(B, D)``; constant.
        logits_s: ``(B, K)`` of the teacher's classifier on ``pooled_s``; gradient flows.
        logits_t: ``(B, K)`` of the teacher; constant.

    Returns:
        Two scalars ``()`` in float32 or better.

    Raises:
        InputError: features or logits of different shapes.

    Example:
        >>> srrl_losses(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 5), torch.full((2, 5), 3.0))
        (tensor(1.), tensor(4.))
    """
    require_one_shape("srrl_losses", pooled_s, pooled_t)
    require_one_shape("srrl_losses", logits_s, logits_t)
    pairs = (pooled_s, pooled_t), (logits_s, logits_t)
    return tuple(F.mse_loss(at_least_float32(s), at_least_float32(t).detach()) for s, t in pairs)


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution, batch norm and ReLU; He's initialisation by the outgoing connections."""
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(teacher_channels), nn.ReLU())


@register_distiller("SRRL", DEFAULTS, paper=PAPER, family="feature")
class SRRL(Distiller):
    """Distances of pooled features and of the logits that the teacher's classifier gives (:func:`srrl_losses`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg.SRRL
        of_student, of_teacher = self.network_facts(cfg)
        self.pooled = self.own.CONNECTOR == "pooled"
        width = of_student.need("pooled_width") if self.pooled else of_student.channels[-1]
        self.connector = connector(width, of_teacher.need("pooled_width"))
        self.classifier = of_teacher.need("classifier")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        if self.pooled:
            last = features_student["pooled_feat"].flatten(1)[:, :, None, None]
        else:
            last = features_student["feats"][-1]
        pooled = spatial_mean(gradient_in_layout(self.connector(last)))
        logits = self.teacher.get_submodule(self.classifier)(pooled)
        feat, logit = srrl_losses(pooled, features_teacher["pooled_feat"].flatten(1), logits, logits_teacher)
        return logits_student, {
            "loss_ce": self.own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_feat": self.own.LOSS.FEAT_WEIGHT * feat,
            "loss_logit": self.own.LOSS.LOGIT_WEIGHT * logit,
        }
