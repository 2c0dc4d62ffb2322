"""TTM and WTTM: knowledge distillation with the temperature at the teacher only.

Zheng, Yang. Knowledge Distillation Based on Transformed Teacher Matching. ICLR 2024. arXiv:2402.11148. Shapes: B
images, K classes.

The power transform of the teacher's distribution is ``p_t^l / sum over k of p_t[k]^l``, the softmax at temperature
``1 / l``. The student's softmax has temperature 1. TTM's loss is their KL divergence (:func:`ttm_loss`), without the
factor T^2. WTTM weights each image by the sum ``sum over k of p_t[k]^l`` (:func:`wttm_loss`): a teacher that hesitates
counts more, from 1 for a sure one to ``K^(1 - l)`` for an even one.

The weights are the authors' only published ones (docs/readings.md): for TTM, those of vgg13 to vgg8; for WTTM, those
that their code uses beside CRD.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.options import Option

from ._base import register_distiller
from ._common import LogitDistiller, logit_losses


def power(default: float) -> Option:
    return Option(default, "l, the power of the teacher's probabilities; 1/T of the softmax", above=0, at_most=1)


DEFAULTS = {"POWER": power(0.1), "LOSS": logit_losses(45.0)}
WTTM_DEFAULTS = {"POWER": power(0.2), "LOSS": logit_losses(4.0)}
PAPER = "Zheng and Yang, ICLR 2024, arXiv:2402.11148"


def ttm_loss(logits_student: Tensor, logits_teacher: Tensor, power: float) -> Tensor:
    """``KL(p_t^l / sum(p_t^l) || p_s)``, mean over the batch; p the softmax at temperature 1, l the power.

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; constant.
        power: l, above 0; 1 gives KD at temperature 1.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> ttm_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]), power=0.5)
        tensor(0.3278)
    """
    return _divergence("ttm_loss", logits_student, logits_teacher, power).mean()


def wttm_loss(logits_student: Tensor, logits_teacher: Tensor, power: float) -> Tensor:
    """``sum(p_t^l) KL(p_t^l / sum(p_t^l) || p_s)``, mean over the batch.

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; constant.
        power: l, above 0; 1 gives KD at temperature 1.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> wttm_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]), power=0.5)
        tensor(0.3688)
    """
    each = _divergence("wttm_loss", logits_student, logits_teacher, power)
    log_p = at_least_float32(logits_teacher.detach()).log_softmax(1)
    return ((power * log_p).logsumexp(1).exp() * each).mean()


def _divergence(name: str, logits_student: Tensor, logits_teacher: Tensor, power: float) -> Tensor:
    """The KL divergence of each image, ``(B,)``."""
    require_one_shape(name, logits_student, logits_teacher)
    student, teacher = at_least_float32(logits_student), at_least_float32(logits_teacher.detach())
    transformed = (power * teacher).log_softmax(1)
    return F.kl_div(student.log_softmax(1), transformed, reduction="none", log_target=True).sum(1)


@register_distiller("TTM", DEFAULTS, paper=PAPER, family="logit")
class TTM(LogitDistiller):
    """KL divergence of the student from the teacher's power transform (:func:`ttm_loss`)."""

    def distance(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        return ttm_loss(logits_student, logits_teacher, self.own.POWER)


@register_distiller("WTTM", WTTM_DEFAULTS, paper=PAPER, family="logit")
class WTTM(LogitDistiller):
    """TTM with a weight for each image, larger if the teacher hesitates (:func:`wttm_loss`)."""

    def distance(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        return wttm_loss(logits_student, logits_teacher, self.own.POWER)
