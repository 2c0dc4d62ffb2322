"""NKD: normalised KD, the target's probability and the distribution over the other classes.

Yang, Zeng, Li, Zhang, Yuan, Li. From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels. ICCV 2023. arXiv:2303.13005. Shapes: B images, K classes, y the label.

``-p_t[y] log p_s[y] - GAMMA T^2 sum over k != y of q_t[k] log q_s[k]``: p is the softmax at temperature 1, q the
softmax at T over the classes other than y, which sums to 1 in both networks (:func:`nkd_loss`). The loss is added to
the cross-entropy. The values are cross-entropies, not divergences: equal logits have a loss above 0.

The defaults are the authors' for ImageNet. Their setting for CIFAR-100, T 3 and GAMMA 3.5, belongs to another recipe
(docs/readings.md).
"""

from __future__ import annotations

from torch import Tensor

from mdistiller.functional import at_least_float32, require_one_shape, require_same_images, without_target
from mdistiller.functional.mixing import class_numbers
from mdistiller.options import Option

from ._base import register_distiller
from ._common import LogitDistiller, logit_losses

DEFAULTS = {
    "GAMMA": Option(1.5, "weight of the other classes' part in nkd_loss; 3.5 in the authors' CIFAR-100", at_least=0),
    "T": Option(1.0, "temperature of the other classes' part; 3 in the authors' CIFAR-100", above=0),
    "LOSS": logit_losses(1.0),
}
PAPER = "Yang et al., ICCV 2023, arXiv:2303.13005"


def nkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    gamma: float,
    temperature: float,
    target_among_others: bool = False,
    reduce: bool = True,
) -> Tensor:
    """``-p_t[y] log p_s[y] - gamma T^2 sum over k != y of q_t[k] log q_s[k]``, mean over the batch.

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; constant.
        target: ``(B,)`` class numbers, or ``(B, K)`` shares; the largest share counts.
        gamma: weight of the second term, which is 0 for two classes.
        temperature: T of q.
        target_among_others: q is over all classes, a slip in the code of SDD.
        reduce: mean over the batch; ``False`` returns each image's value.

    Returns:
        Scalar ``()``, or ``(B,)``, in float32 or better.

    Raises:
        InputError: logits of different shapes, or a different number of targets.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5, temperature=1.0)
        tensor(1.8377)
    """
    require_one_shape("nkd_loss", logits_student, logits_teacher)
    require_same_images("nkd_loss", logits_student, target)
    target = class_numbers(target)
    student, teacher = at_least_float32(logits_student), at_least_float32(logits_teacher).detach()
    of_target = target[:, None]
    first = teacher.softmax(1).gather(1, of_target) * student.log_softmax(1).gather(1, of_target)
    if not target_among_others:
        student, teacher = without_target(student, target), without_target(teacher, target)
    second = (teacher / temperature).softmax(1) * (student / temperature).log_softmax(1)
    each = -first.squeeze(1) - gamma * temperature**2 * second.sum(1)
    return each.mean() if reduce else each


@register_distiller("NKD", DEFAULTS, paper=PAPER, family="logit")
class NKD(LogitDistiller):
    """Cross-entropies with the teacher's probability of the target and of the other classes (:func:`nkd_loss`)."""

    def distance(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        return nkd_loss(logits_student, logits_teacher, target, self.own.GAMMA, self.own.T)
