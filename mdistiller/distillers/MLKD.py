"""MLKD (MLLD): match predictions at several temperatures, at the level of images, of the batch and of the classes.

Jin, Wang, Lin. Multi-Level Logit Distillation. CVPR 2023. The fork LSKD uses the name MLKD. The authors' code uses
``KD_ours``, which is also a name here. Shapes: B images, K classes.

The networks see a weak and a strong view. With p the predictions at one temperature, the terms are the KL divergence
for each image (``kd``) and the squared distances of Gram matrices: ``p^T p`` ``(K, K)`` over classes (``cc``), and
``p p^T`` ``(B, B)`` over the batch (``bc``). Each term is summed over the temperatures ``KD.TEMPERATURE``, 3, 5, 2 and
6. Weights and temperature are KD's (section ``KD``), as in the authors' code. ``EXPERIMENT.LOGIT_STAND`` (LSKD,
arXiv:2403.01427) standardises the logits of ``kd`` only.

The authors' code masks the weak view's terms: images (for ``cc``, classes) drop out if the teacher is surer of them
than of the median one. But the code takes the mean before it masks. So each term is multiplied by the kept share,
about a half. Also, the last two temperatures of the strong view's ``kd`` see the weak view's logits.

- ``KD.MLKD.AS_PUBLISHED`` True (default) computes this. It gave the published numbers of MLLD and of LSKD on MLLD;
- False masks each image and each class, and the strong view's terms see the strong view. This is our reading of the
  code's intention: the mask of ``kd`` is on images, the masks of ``cc`` and ``bc`` are on columns of the Gram matrix.

The authors' code computes ``cc`` and ``bc`` of the strong view too, and drops them. They are not computed here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.options import Option
from mdistiller.registry import distiller_dict

from ._base import Distiller, register_distiller
from ._common import wants_standardised_logits
from .KD import DEFAULTS as KD_DEFAULTS
from .KD import kd_loss

PUBLISHED = Option(True, "masks and strong view as in the authors' code; False: as we think was intended")
DEFAULTS = {**KD_DEFAULTS, "MLKD": {"AS_PUBLISHED": PUBLISHED}}
PAPER = "Jin et al., Multi-Level Logit Distillation, CVPR 2023"

TEMPERATURES = (3.0, 5.0, 2.0, 6.0)  # beside KD.TEMPERATURE
STRONG = 3  # in the authors' code, the strong view's terms see it at the first three temperatures only


def cc_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, reduce: bool = True) -> Tensor:
    """``sum((p_t^T p_t - p_s^T p_s)^2) / K``, p the softened predictions: the classes' Gram matrices.

    Args:
        logits_student: ``(B, K)`` raw scores; gradient flows.
        logits_teacher: ``(B, K)`` raw scores; gradient flows if they require one.
        temperature: T > 0; there is no factor T^2.
        reduce: sum over the entries; ``False`` returns every entry.

    Returns:
        Scalar ``()``, or ``(K, K)``, in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> cc_loss(student, teacher, temperature=4.0)
        tensor(0.0591)
    """
    require_one_shape("cc_loss", logits_student, logits_teacher)
    return _gram_distance(*_predictions(logits_student, logits_teacher, temperature, transposed=True), reduce)


def bc_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, reduce: bool = True) -> Tensor:
    """``sum((p_t p_t^T - p_s p_s^T)^2) / B``, p the softened predictions: the images' Gram matrices.

    Arguments and errors are those of :func:`cc_loss`. Returns a scalar ``()``, or ``(B, B)``.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> bc_loss(student, teacher, temperature=4.0)
        tensor(0.0114)
    """
    require_one_shape("bc_loss", logits_student, logits_teacher)
    return _gram_distance(*_predictions(logits_student, logits_teacher, temperature, transposed=False), reduce)


def _predictions(student: Tensor, teacher: Tensor, temperature: float, transposed: bool) -> list[Tensor]:
    found = [F.softmax(at_least_float32(z) / temperature, dim=1) for z in (student, teacher)]
    return [p.T for p in found] if transposed else found


def _gram_distance(p_student: Tensor, p_teacher: Tensor, reduce: bool) -> Tensor:
    with torch.autocast(p_student.device.type, enabled=False):
        entries = (p_teacher @ p_teacher.T - p_student @ p_student.T).square() / len(p_student)
    return entries.sum() if reduce else entries


def below_median(confidence: Tensor) -> Tensor:
    """Which entries of ``(N,)`` are at most the median. For even N the median is the mean of the middle two."""
    middle = confidence.kthvalue((len(confidence) + 1) // 2).values  # no entry lies between the middle two
    return confidence <= middle


def mlkd_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    temperature: float,
    logit_stand: bool = False,
    as_published: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kd`` (both views), ``cc`` and ``bc`` (weak view), each summed over the temperatures.

    The three terms are :func:`~mdistiller.distillers.KD.kd_loss`, :func:`cc_loss` and :func:`bc_loss`, masked. Plain
    form: tests/oracles/mlkd.py.

    Args:
        student: logits ``(B, K)`` of the weak and of the strong view; gradient flows.
        teacher: the teacher's logits of both views; constant.
        temperature: the first of the five temperatures.
        logit_stand: standardise the logits for ``kd``.
        as_published: masks and strong view as in the authors' code, see the top of the file.

    Returns:
        Three scalars ``()``, unweighted, in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> mlkd_losses((student, student), (teacher, teacher), temperature=4.0)
        (tensor(16.9210), tensor(0.2057), tensor(0.1322))
    """
    student, teacher = [at_least_float32(z) for z in student], [at_least_float32(z.detach()) for z in teacher]
    certainty = teacher[0].softmax(1)
    images, classes = below_median(certainty.amax(1)), below_median(certainty.sum(0))
    weak, strong = zip(student, teacher, strict=True)
    kd = cc = bc = 0.0
    for number, t in enumerate((temperature, *TEMPERATURES)):
        if as_published:
            instead = strong if number < STRONG else weak
            share_of_images, share_of_classes = (mask.to(certainty.dtype).mean() for mask in (images, classes))
            kd = kd + kd_loss(*weak, t, logit_stand) * share_of_images + kd_loss(*instead, t, logit_stand)
            cc = cc + cc_loss(*weak, t) * share_of_classes
            bc = bc + bc_loss(*weak, t) * share_of_images
        else:
            of_weak = (kd_loss(*weak, t, logit_stand, reduce=False) * images).mean()
            kd = kd + of_weak + kd_loss(*strong, t, logit_stand)
            cc = cc + (cc_loss(*weak, t, reduce=False) * classes).sum()
            bc = bc + (bc_loss(*weak, t, reduce=False) * images).sum()
    return kd, cc, bc


@register_distiller("MLKD", DEFAULTS, section="KD", paper=PAPER, family="logit")
class MLKD(Distiller):
    """Multi-level logit KD: image, batch and class level, several temperatures, two views."""

    mixed_labels = True
    standardises_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.KD
        self.temperature, self.as_published = own.TEMPERATURE, own.MLKD.AS_PUBLISHED
        self.ce_weight, self.kd_weight = own.LOSS.CE_WEIGHT, own.LOSS.KD_WEIGHT
        self.logit_stand = wants_standardised_logits(self, cfg)

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student = self.student(image_weak)[0], self.student(image_strong)[0]
        with torch.no_grad():
            teacher = self.teacher(torch.cat([image_weak, image_strong]))[0].chunk(2)
        ce = F.cross_entropy(student[0], target) + F.cross_entropy(student[1], target)
        kd, cc, bc = mlkd_losses(student, teacher, self.temperature, self.logit_stand, self.as_published)
        return student[0], {
            "loss_ce": self.ce_weight * ce,
            "loss_kd": self.kd_weight * kd,
            "loss_cc": self.kd_weight * cc,
            "loss_bc": self.kd_weight * bc,
        }


distiller_dict.add("KD_ours", MLKD)  # the authors' own name
