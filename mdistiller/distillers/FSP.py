"""FSP: flow of the solution procedure, start the student with the teacher's Gram matrices between layers.

Yim, Joo, Bae, Kim. A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning.
CVPR 2017. Shapes: B images, maps ``(B, C, H, W)``.

The FSP matrix of two neighbouring maps is ``G[c, d] = mean over positions of F_1[c] F_2[d]``; the larger map is pooled
to the smaller size. The loss is the mean squared difference of student's and teacher's matrices, summed over
neighbouring maps, the stem's included (:func:`fsp_loss`). So both networks need maps of equal widths, but not of equal
sizes.

Two stages, as in the paper and RepDistiller: before training, this loss alone trains the student (``PREPARE``); then
the cross-entropy alone. ``LOSS.FEAT_WEIGHT`` keeps the loss in training; published numbers have 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import gradient_in_layout, pool_to_common, require_one_shape
from mdistiller.registry import InputError

from ._base import register_distiller
from ._common import feature_losses
from ._prepared import StartedByDistance, preparation_options

DEFAULTS = {"PREPARE": preparation_options(epochs=30, lr=0.0), "LOSS": feature_losses(0.0)}
PAPER = "Yim et al., CVPR 2017"


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """``G[c, d] = mean over positions of first[c] second[d]``, at the smaller of both sizes (Eq. 1).

    Args:
        first: ``(B, C, H, W)``; gradient flows.
        second: ``(B, D, H', W')``; gradient flows.

    Returns:
        ``(B, C, D)`` in float32 or better.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (x.flatten(2) for x in pool_to_common(first, second))
        return first @ second.mT / first.shape[2]


def fsp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """``sum over neighbouring maps of mean((G_s - G_t)^2)``, the mean over images and entries (Eq. 2).

    Args:
        g_s: the student's maps, shallow to deep; gradient flows.
        g_t: the teacher's maps, of the same widths; constant.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: maps of different widths or images.
        ValueError: lists of different length.

    Example:
        >>> ones = torch.ones(2, 3, 4, 4)
        >>> fsp_loss([ones, ones, ones], [ones, 2 * ones, ones])
        tensor(2.)
    """
    total = 0.0
    for pair_s, pair_t in zip(pairwise(g_s), pairwise(g_t), strict=True):
        of_student, of_teacher = fsp_matrix(*pair_s), fsp_matrix(*pair_t).detach()
        require_one_shape("fsp_loss", of_student, of_teacher)
        total = total + (of_student - of_teacher).square().mean()
    return total


@register_distiller("FSP", DEFAULTS, paper=PAPER, family="relation")
class FSP(StartedByDistance):
    """Gram matrices of neighbouring maps, before training (:func:`fsp_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        of_student, of_teacher = self.network_facts(cfg)
        if of_student.channels != of_teacher.channels:
            raise InputError(
                f"FSP compares Gram matrices, so both networks need maps of equal widths; the {of_student} has "
                f"{of_student.channels}, the {of_teacher} {of_teacher.channels}; choose another pair or method"
            )

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return fsp_loss([gradient_in_layout(x) for x in features_student["feats"]], features_teacher["feats"])
