"""TAKD: distil through an assistant, a network between teacher and student.

Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh. Improved Knowledge Distillation via Teacher Assistant. AAAI
2020. arXiv:1902.03393. Shapes: B images, K classes.

A chain of runs of KD: the teacher trains an assistant, and the assistant trains the student. This is the last run:
``DISTILLER.TEACHER`` names the assistant's architecture, and ``DISTILLER.TEACHER_CKPT`` its weights, a file that a run
of KD with the real teacher wrote. The loss is ``LOSS.CE_WEIGHT * CE + LOSS.KD_WEIGHT * KD`` (:func:`takd_loss`).

The authors' code takes the mean of the divergence over batch *and* classes (``MEAN_OVER elements``), so that KD is K
times smaller than in the paper. The tables compare runs with the usual recipe, which is ``MEAN_OVER batch`` with KD's
weights. No source names the tables' assistants; those of the configs are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.options import Option

from ._base import Distiller, register_distiller
from .KD import DEFAULTS as KD_DEFAULTS
from .KD import kd_loss

MEANS = ("batch", "elements")
DEFAULTS = {**KD_DEFAULTS, "MEAN_OVER": Option("batch", "what the mean of KD runs over", one_of=MEANS)}
PAPER = "Mirzadeh et al., AAAI 2020, arXiv:1902.03393"


def takd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, mean_over: str = "batch") -> Tensor:
    """``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the batch, or over batch and classes.

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores of the assistant; constant.
        temperature: T > 0.
        mean_over: ``"batch"``: :func:`~mdistiller.distillers.KD.kd_loss`; ``"elements"``: K times smaller.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> takd_loss(student, teacher, 4.0), takd_loss(student, teacher, 4.0, "elements")
        (tensor(1.7751), tensor(0.8876))
    """
    loss = kd_loss(logits_student, logits_teacher.detach(), temperature)
    return loss / logits_student.shape[1] if mean_over == "elements" else loss


@register_distiller("TAKD", DEFAULTS, paper=PAPER, family="logit")
class TAKD(Distiller):
    """KD from an assistant, which was itself distilled (:func:`takd_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg.TAKD

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.own
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        distance = takd_loss(logits_student, logits_teacher, own.TEMPERATURE, own.MEAN_OVER)
        return logits_student, {
            "loss_ce": own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": own.LOSS.KD_WEIGHT * distance,
        }
