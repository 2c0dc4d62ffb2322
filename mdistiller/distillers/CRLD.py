"""CRLD: KD within and across two views, where the teacher is sure.

Zhang, Liu, Cai, Ma. Cross-View Consistency Regularisation for Knowledge Distillation. ACM MM 2024.
arXiv:2412.16493. Shapes: B images, K classes.

KD of four pairs: the student's weak and strong view with the teacher's prediction of the same view (within) and of the
other view (across). An image counts where the teacher's top probability is at least ``TAU_WEAK`` or ``TAU_STRONG``; the
mean is over all images (:func:`crld_losses`).

The public codes choose the threshold by the kind of the term: the terms within views are masked by the teacher's weak
prediction, the terms across views by its strong one. The paper speaks of thresholds of views. ``MASK_BY`` ``term``
(default) is the codes' rule, ``view`` masks each term by its own teacher's view.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32
from mdistiller.options import Option, weight

from ._base import Distiller, register_distiller
from .KD import kd_loss

DEFAULTS = {
    "TEMPERATURE": Option(4.0, "divides the logits of both networks", above=0),
    "TAU_WEAK": Option(0.9, "smallest top probability of the teacher's weak view", at_least=0, at_most=1),
    "TAU_STRONG": Option(0.2, "smallest top probability of the teacher's strong view", at_least=0, at_most=1),
    "MASK_BY": Option("term", "which teacher's view masks a term, see the method's file", one_of=("term", "view")),
    "CE_WEIGHT": weight(1.0, "of the cross-entropies of both views"),
    "WITHIN_WEIGHT": weight(2.0, "of KD within views"),
    "ACROSS_WEIGHT": weight(0.5, "of KD across views"),
}
PAPER = "Zhang et al., ACM MM 2024, arXiv:2412.16493"


def sure(logits_teacher: Tensor, tau: float) -> Tensor:
    """1 for images whose top probability is at least ``tau``, else 0; ``(B,)`` for ``(B, K)``."""
    logits_teacher = at_least_float32(logits_teacher.detach())
    return (logits_teacher.softmax(1).amax(1) >= tau).to(logits_teacher.dtype)


def crld_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    temperature: float = 4.0,
    tau_weak: float = 0.9,
    tau_strong: float = 0.2,
    mask_by: str = "term",
) -> tuple[Tensor, Tensor]:
    """``mean(m KD(s, t))`` summed over the two pairs within views, and the same over the two pairs across views.

    KD is :func:`~mdistiller.distillers.KD.kd_loss` of each image, m the mask of :func:`sure`.

    Args:
        student: logits ``(B, K)`` of the weak and of the strong view; gradient flows.
        teacher: the teacher's logits of both views; constant.
        temperature: T > 0.
        tau_weak: threshold of the teacher's weak view.
        tau_strong: threshold of its strong view.
        mask_by: ``"term"`` or ``"view"``, see the top of the file.

    Returns:
        Two scalars ``()``, unweighted, in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> crld_losses((student, student), (teacher, student))
        (tensor(1.7751), tensor(1.7751))
    """
    teacher = [z.detach() for z in teacher]
    masks = sure(teacher[0], tau_weak), sure(teacher[1], tau_strong)

    def masked(of_student: int, of_teacher: int) -> Tensor:
        mask = of_teacher if mask_by == "view" else int(of_student != of_teacher)
        return (masks[mask] * kd_loss(student[of_student], teacher[of_teacher], temperature, reduce=False)).mean()

    return masked(0, 0) + masked(1, 1), masked(1, 0) + masked(0, 1)


@register_distiller("CRLD", DEFAULTS, paper=PAPER, family="logit")
class CRLD(Distiller):
    """KD within and across a weak and a strong view (:func:`crld_losses`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg.CRLD

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.own
        student = self.student(image_weak)[0], self.student(image_strong)[0]
        with torch.no_grad():
            teacher = self.teacher(torch.cat([image_weak, image_strong]))[0].chunk(2)
        within, across = crld_losses(student, teacher, own.TEMPERATURE, own.TAU_WEAK, own.TAU_STRONG, own.MASK_BY)
        ce = F.cross_entropy(student[0], target) + F.cross_entropy(student[1], target)
        return student[0], {
            "loss_ce": own.CE_WEIGHT * ce,
            "loss_within": own.WITHIN_WEIGHT * within,
            "loss_across": own.ACROSS_WEIGHT * across,
        }
