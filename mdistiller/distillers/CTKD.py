"""CTKD: KD with a temperature that is learned adversarially, by a curriculum from easy to hard.

Li, Li, Yang, Zhao, Song, Luo, Li, Yang. Curriculum Temperature for Knowledge Distillation. AAAI 2023. arXiv:2211.16231.

The temperature ``T = T_START + T_END * sigmoid(g)`` has one parameter ``g``, "Global-T". The student lowers KD's loss
and ``g`` raises it: the gradient of ``g`` is multiplied by lambda. Lambda falls from ``DECAY_MAX`` 0 to ``DECAY_MIN``
-1 along half a cosine within ``DECAY_LOOPS`` epochs. In the paper, T's range is given by its two ends. This follows the
authors' code, where ``T_END`` is the width of the range: T lies in (1, 21) and starts at 15.6.

Not implemented: a temperature for each image ("Instance-T"). Standardised logits (``EXPERIMENT.LOGIT_STAND``) come
from LSKD, arXiv:2403.01427.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.options import MANY, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import wants_standardised_logits
from .KD import kd_loss

DEFAULTS = {
    "T_START": Option(1.0, "lowest temperature", above=0),
    "T_END": Option(20.0, "width of the range of temperatures", above=0),
    "DECAY_MAX": Option(0.0, "lambda before the first epoch"),
    "DECAY_MIN": Option(-1.0, "lambda from epoch DECAY_LOOPS on"),
    "DECAY_LOOPS": Option(10, "epochs in which lambda falls", at_least=0, at_most=MANY),
    "LOSS": {"CE_WEIGHT": weight(0.1, "of the cross-entropy"), "KD_WEIGHT": weight(0.9, "of kd_loss")},
}
PAPER = "Li et al., AAAI 2023, arXiv:2211.16231"


def learned_temperature(g: Tensor, t_start: float, t_end: float, lambda_: float) -> Tensor:
    """``t_start + t_end * sigmoid(g)``, with the gradient of ``g`` multiplied by ``lambda_``.

    Args:
        g: ``(1,)``; gradient flows.
        t_start: lowest temperature.
        t_end: width of the range.
        lambda_: the factor, see :func:`reversal`. A negative factor reverses the gradient.

    Returns:
        ``(1,)``.
    """
    return t_start + t_end * torch.sigmoid(_ScaledGradient.apply(g, lambda_))


def reversal(epoch: int, decay_max: float, decay_min: float, loops: int) -> float:
    """Lambda in ``epoch``: it falls from ``decay_max`` to ``decay_min`` along half a cosine and is then constant.

    Args:
        epoch: from 1.
        decay_max: lambda before the first epoch.
        decay_min: lambda from epoch ``loops`` on.
        loops: number of epochs of the fall; 0: ``decay_min`` from the start.
    """
    share = min(epoch / loops, 1.0) if loops else 1.0
    return decay_min + (decay_max - decay_min) * 0.5 * (1 + math.cos(math.pi * share))


class _ScaledGradient(torch.autograd.Function):
    """The identity; the gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


@register_distiller("CTKD", DEFAULTS, paper=PAPER, family="logit")
class CTKD(Distiller):
    """KD at a temperature learned adversarially, from easy to hard (a curriculum)."""

    mixed_labels = True
    standardises_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.CTKD
        self.t_start, self.t_end = own.T_START, own.T_END
        self.decay_max, self.decay_min, self.decay_loops = own.DECAY_MAX, own.DECAY_MIN, own.DECAY_LOOPS
        self.ce_weight, self.kd_weight = own.LOSS.CE_WEIGHT, own.LOSS.KD_WEIGHT
        if not self.t_start + self.t_end > 0:
            raise InputError(f"CTKD.T_START plus CTKD.T_END must be above 0, got {self.t_start + self.t_end}")
        self.logit_stand = wants_standardised_logits(self, cfg)
        self.global_T = nn.Parameter(torch.ones(1))

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        lambda_ = reversal(epoch, self.decay_max, self.decay_min, self.decay_loops)
        temperature = learned_temperature(self.global_T, self.t_start, self.t_end, lambda_)
        self.monitors = {"temperature": temperature.detach().squeeze()}
        loss = kd_loss(logits_student, logits_teacher, temperature, self.logit_stand)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.kd_weight * loss,
        }
