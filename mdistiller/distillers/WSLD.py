"""WSLD: weighted soft labels, KD counts where the student is worse than the teacher.

Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang. Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective. ICLR 2021. arXiv:2102.00650. Shapes: B images, K classes, y the label.

``w T^2 * (-sum over k of p_t[k] log p_s[k])``, p the softmax at temperature T, with the image's weight
``w = 1 - exp(-L_s / L_t)``; ``L = -log softmax(z)[y]`` are the cross-entropies of both networks, constant
(:func:`wsld_loss`). The value is a cross-entropy, not a divergence: equal logits have a loss above 0.

The defaults, T 4 and weight 2.25, are those that the author names for CIFAR-100, with teachers trained anew; the
authors' code for ImageNet has T 2 and 2.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.functional import at_least_float32, require_one_shape, require_same_images
from mdistiller.functional.mixing import class_numbers
from mdistiller.options import Option

from ._base import register_distiller
from ._common import LogitDistiller, logit_losses

DEFAULTS = {
    "T": Option(4.0, "the temperature; 2 in the authors' ImageNet", above=0),
    "LOSS": logit_losses(2.25),
}
PAPER = "Zhou et al., ICLR 2021, arXiv:2102.00650"

EPS = 1e-7  # added to the teacher's cross-entropy, as in the authors' code


def wsld_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``w T^2 * (-sum over k of p_t[k] log p_s[k])``, mean over the batch (:func:`weights_of_images`).

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows, but not through w.
        logits_teacher: ``(B, K)`` raw scores; constant.
        target: ``(B,)`` class numbers, or ``(B, K)`` shares; the largest share counts.
        temperature: T > 0.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: logits of different shapes, or a different number of targets.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> wsld_loss(student, teacher, torch.tensor([1]), temperature=4.0)
        tensor(1.7572)
    """
    require_one_shape("wsld_loss", logits_student, logits_teacher)
    require_same_images("wsld_loss", logits_student, target)
    student, teacher = at_least_float32(logits_student), at_least_float32(logits_teacher).detach()
    soft = -((teacher / temperature).softmax(1) * (student / temperature).log_softmax(1)).sum(1)
    return temperature**2 * (weights_of_images(student, teacher, class_numbers(target)) * soft).mean()


def weights_of_images(logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
    """``1 - exp(-L_s / L_t)`` of the cross-entropies L: 0 for a perfect student, near 1 where the teacher is better.

    Args:
        logits_student: ``(B, K)``.
        logits_teacher: ``(B, K)``.
        target: ``(B,)`` class numbers.

    Returns:
        ``(B,)`` from 0 to 1, constant.
    """
    of_student, of_teacher = (
        F.cross_entropy(z.detach(), target, reduction="none") for z in (logits_student, logits_teacher)
    )
    return -torch.expm1(-of_student / (of_teacher + EPS))


@register_distiller("WSLD", DEFAULTS, paper=PAPER, family="logit")
class WSLD(LogitDistiller):
    """Soft cross-entropy, weighted by how much worse the student is than the teacher (:func:`wsld_loss`)."""

    def distance(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        return wsld_loss(logits_student, logits_teacher, target, self.own.T)
