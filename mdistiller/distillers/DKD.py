"""DKD: decoupled KD, the target class and the other classes get separate weights.

Zhao, Cui, Song, Qiu, Liang. Decoupled Knowledge Distillation. CVPR 2022. arXiv:2203.08679. Equations are the paper's.
Shapes: B images, K classes.

``KD = TCKD + (1 - p_t) NCKD`` (Eq. 6), with ``p_t`` the teacher's probability of the target class. If the teacher is
sure of the target, KD almost ignores the other classes. DKD minimises ``ALPHA * TCKD + BETA * NCKD`` (Eq. 7).

The values are the paper's. Both distributions are computed from log-probabilities (:func:`tckd_loss`). The authors'
code takes the logarithm of a probability; in float32 that is infinite if two logits differ by more than about 104.
Standardised logits (``EXPERIMENT.LOGIT_STAND``) come from LSKD, arXiv:2403.01427.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, require_same_images, without_target, zs_norm
from mdistiller.functional.mixing import class_numbers
from mdistiller.options import MANY, Option, weight

from ._base import Distiller, register_distiller
from ._common import wants_standardised_logits, warmup

DEFAULTS = {
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
    "ALPHA": weight(1.0, "of the target class's term"),
    "BETA": weight(8.0, "of the other classes' term"),
    "T": Option(4.0, "the temperature", above=0),
    "WARMUP": Option(20, "epochs in which ALPHA and BETA rise linearly", at_least=0, at_most=MANY),
}
PAPER = "Zhao et al., CVPR 2022, arXiv:2203.08679"


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
    logit_stand: bool = False,
    reduce: bool = True,
) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)``, mean over the batch (Eq. 7; :func:`tckd_loss`, :func:`nckd_loss`).

    Plain form: tests/oracles/dkd.py.

    Args:
        logits_student: ``(B, K)`` raw scores, K at least 2; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; gradient flows if they require one.
        target: ``(B,)`` class numbers, or ``(B, K)`` shares of mixed labels; the largest share counts.
        alpha: weight of TCKD. The paper's value is 1.
        beta: weight of NCKD, which is 0 for two classes. The paper: 1 to 8.
        temperature: T > 0.
        logit_stand: standardise both networks' logits first (:func:`~mdistiller.functional.zs_norm`).
        reduce: mean over the batch; ``False`` returns each image's value.

    Returns:
        Scalar ``()``, or ``(B,)``, in float32 or better; 0 for equal logits.

    Raises:
        InputError: logits of different shapes, or a different number of targets.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4.0)
        tensor(3.9793)
    """
    require_one_shape("dkd_loss", logits_student, logits_teacher)
    require_same_images("dkd_loss", logits_student, target)
    target = class_numbers(target)
    student, teacher = at_least_float32(logits_student), at_least_float32(logits_teacher)
    if logit_stand:
        student, teacher = zs_norm(student), zs_norm(teacher)
    given = student / temperature, teacher / temperature, target, reduce
    return (alpha * tckd_loss(*given) + beta * nckd_loss(*given)) * temperature**2


def tckd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, reduce: bool = True) -> Tensor:
    """``KL(b_t || b_s)`` of ``b = (p_target, 1 - p_target)``, mean over the batch (TCKD of Eq. 5).

    With the margin ``m = z_target - logsumexp(z_others)``, ``b = (sigmoid(m), sigmoid(-m))``. Their logarithms are
    exact for logits of any size.

    Args:
        logits_student: ``(B, K)``, already divided by the temperature; gradient flows.
        logits_teacher: ``(B, K)``, already divided by the temperature; gradient flows if it requires one.
        target: ``(B,)`` class numbers.
        reduce: mean over the batch; ``False`` returns each image's value.

    Returns:
        Scalar ``()``, or ``(B,)``.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> tckd_loss(student, teacher, torch.tensor([1]))
        tensor(0.0795)
    """
    two_way = []
    for logits in (logits_student, logits_teacher):
        margin = logits.gather(1, target[:, None]).squeeze(1) - without_target(logits, target).logsumexp(1)
        two_way.append(F.logsigmoid(torch.stack([margin, -margin], dim=1)))
    return _divergence(*two_way, reduce)


def nckd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, reduce: bool = True) -> Tensor:
    """``KL(q_t || q_s)`` of ``q = softmax(z_others)``, mean over the batch (NCKD of Eq. 5).

    With two classes q has one entry, and the loss is 0.

    Args:
        logits_student: ``(B, K)``, already divided by the temperature; gradient flows.
        logits_teacher: ``(B, K)``, already divided by the temperature; gradient flows if it requires one.
        target: ``(B,)`` class numbers.
        reduce: mean over the batch; ``False`` returns each image's value.

    Returns:
        Scalar ``()``, or ``(B,)``.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> nckd_loss(student, teacher, torch.tensor([0]))
        tensor(0.4621)
    """
    others = (without_target(logits, target).log_softmax(1) for logits in (logits_student, logits_teacher))
    return _divergence(*others, reduce)


def _divergence(log_p_student: Tensor, log_p_teacher: Tensor, reduce: bool) -> Tensor:
    if reduce:
        return F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(1)


@register_distiller("DKD", DEFAULTS, paper=PAPER, family="logit")
class DKD(Distiller):
    """Decoupled KD: target-class and non-target-class divergence, weighted apart (:func:`dkd_loss`)."""

    mixed_labels = True
    standardises_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.DKD
        self.ce_weight, self.alpha, self.beta = own.CE_WEIGHT, own.ALPHA, own.BETA
        self.temperature, self.warmup = own.T, own.WARMUP
        self.logit_stand = wants_standardised_logits(self, cfg)

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        loss = dkd_loss(
            logits_student, logits_teacher, target, self.alpha, self.beta, self.temperature, self.logit_stand
        )
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * loss,
        }
