"""KD: match the teacher's temperature-softened class distribution.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
Departs from the paper: the weights of the two terms are free (mdistiller: 0.1 and 0.9).

``EXPERIMENT.LOGIT_STAND`` with temperature 2 and weight 9 gives LSKD (Sun, Ren, Li, Wang, Cao. Logit Standardization in
Knowledge Distillation. CVPR 2024. arXiv:2403.01427).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, zs_norm
from mdistiller.options import Option, weight

from ._base import Distiller, register_distiller
from ._common import wants_standardised_logits

DEFAULTS = {
    "TEMPERATURE": Option(4.0, "divides the logits of both networks", above=0),
    "LOSS": {"CE_WEIGHT": weight(0.1, "of the cross-entropy"), "KD_WEIGHT": weight(0.9, "of kd_loss")},
}
PAPER = "Hinton et al., NIPS 2014 workshop, arXiv:1503.02531"


def kd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float | Tensor,
    logit_stand: bool = False,
    reduce: bool = True,
) -> Tensor:
    """``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the batch.

    The factor T^2 keeps the size of the gradient roughly independent of T (Sec. 2).

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; gradient flows if they require one.
        temperature: T > 0; gradient flows.
        logit_stand: standardise both networks' logits first (:func:`~mdistiller.functional.zs_norm`).
        reduce: mean over the batch; ``False`` returns each image's value.

    Returns:
        Scalar ``()``, or ``(B,)``, in float32 or better; 0 for equal logits.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> kd_loss(student, teacher, temperature=4.0)
        tensor(1.7751)
    """
    require_one_shape("kd_loss", logits_student, logits_teacher)
    student, teacher = at_least_float32(logits_student), at_least_float32(logits_teacher)
    if logit_stand:
        student, teacher = zs_norm(student), zs_norm(teacher)
    log_p_student, log_p_teacher = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    each = F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(1) * temperature**2
    return each.mean() if reduce else each


@register_distiller("KD", DEFAULTS, paper=PAPER, family="logit")
class KD(Distiller):
    """KL divergence of the softened class distributions (:func:`kd_loss`)."""

    mixed_labels = True
    standardises_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.temperature = cfg.KD.TEMPERATURE
        self.ce_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_weight = cfg.KD.LOSS.KD_WEIGHT
        self.logit_stand = wants_standardised_logits(self, cfg)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.kd_weight * self.distance(logits_student, logits_teacher),
        }

    def distance(self, logits_student: Tensor, logits_teacher: Tensor) -> Tensor:
        return kd_loss(logits_student, logits_teacher, self.temperature, self.logit_stand)


@register_distiller("KD_TWO_VIEWS", DEFAULTS, section="KD", paper=PAPER, family="logit")
class KDTwoViews(KD):
    """KD on a weak and a strong view: each term is the sum over both (as MLLD and VRM sum theirs).

    This is the fair baseline of methods that see two views. The frozen teacher takes both views in one batch. The
    student takes one view after the other, so that BatchNorm does not mix their statistics.
    """

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weak, _ = self.student(image_weak)
        strong, _ = self.student(image_strong)
        with torch.no_grad():
            teacher_weak, teacher_strong = self.teacher(torch.cat([image_weak, image_strong]))[0].chunk(2)
        ce = F.cross_entropy(weak, target) + F.cross_entropy(strong, target)
        kd = self.distance(weak, teacher_weak) + self.distance(strong, teacher_strong)
        return weak, {"loss_ce": self.ce_weight * ce, "loss_kd": self.kd_weight * kd}
