"""VID: maximise a variational lower bound on the mutual information of the teacher's and the student's features.

Ahn, Hu, Damianou, Lawrence, Dai. Variational Information Distillation for Knowledge Transfer. CVPR 2019.
arXiv:1904.05835. Shapes: B images, C channels, H, W positions.

The bound for a pair of maps is the log-likelihood of the teacher's map under a Gaussian. A regressor computes the
Gaussian's mean from the student's map. Its variance is ``softplus(log_scale) + EPS``, one learned parameter for each
channel of the teacher. The loss is the negative log-likelihood, summed over the stages.

Departs from the paper, as mdistiller does: the larger of two maps is pooled to the smaller size; there is no term for
the logits. Departs from mdistiller (docs/differences.md): variances are learned, saved and resumed, while mdistiller's
stay at ``INIT_PRED_VAR`` (``LEARN_VARIANCE``); new regressors leave the networks' state unchanged; networks may have
different numbers of maps (``STAGES``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, channel_mean_square, pool_to_common, require_one_shape
from mdistiller.options import Option, dead
from mdistiller.registry import InputError

from ._base import register_distiller
from ._common import STAGES, FeatureDistiller, feature_losses, generator_kept, pick_pairs, stage_pairs

DEFAULTS = {
    "EPS": Option(1e-5, "smallest variance", above=0),
    "INIT_PRED_VAR": Option(5.0, "initial variance, above EPS", above=0),
    "LEARN_VARIANCE": Option(True, "train the variances; False: constant, as in mdistiller"),
    "STAGES": STAGES,
    "INPUT_SIZE": dead((32, 32), "DATASET.IMAGE_SIZE says it"),
    "LOSS": feature_losses(1.0),
}
PAPER = "Ahn et al., CVPR 2019, arXiv:1904.05835"


def predicted_variance(log_scale: Tensor, eps: float) -> Tensor:
    """``softplus(log_scale) + eps``, finite and above 0 for every finite ``log_scale``."""
    return F.softplus(at_least_float32(log_scale)) + eps


def vid_loss(regressor: nn.Module, log_scale: Tensor, f_s: Tensor, f_t: Tensor, eps: float = 1e-5) -> Tensor:
    """``mean of ((F_t - m(F_s))^2 / v + log v) / 2`` over all elements: negative log-likelihood without its constant.

    v is the :func:`predicted_variance` of each channel, m the regressor. Plain form: tests/oracles/vid.py.

    Args:
        regressor: m, from ``(B, C_s, H, W)`` to ``(B, C_t, H, W)``; gradient flows.
        log_scale: ``(C_t,)``, one for each channel; gradient flows.
        f_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        f_t: ``(B, C_t, H_t, W_t)``; gradient flows if it requires one.
        eps: least variance, in squared units of the teacher's map.

    Returns:
        Scalar ``()``, at least log(eps) / 2.

    Raises:
        InputError: the maps have different numbers of images, or the regressor has another output width.

    Example:
        >>> f_s, f_t = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> vid_loss(nn.Identity(), torch.zeros(4), f_s, f_t)
        tensor(0.5381)
    """
    f_s, f_t = pool_to_common(f_s, f_t)
    mean = at_least_float32(regressor(f_s))
    require_one_shape("vid_loss", mean, f_t)
    variance = predicted_variance(log_scale, eps)
    return 0.5 * (channel_mean_square(mean - f_t) / variance + variance.log()).mean()


@register_distiller("VID", DEFAULTS, paper=PAPER, family="feature")
class VID(FeatureDistiller):
    """Variational bound on mutual information, stage by stage (:func:`vid_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        own = cfg.VID
        self.eps = own.EPS
        if not own.INIT_PRED_VAR > own.EPS:
            raise InputError(f"VID.INIT_PRED_VAR must be above VID.EPS {own.EPS}, got {own.INIT_PRED_VAR}")
        of_student, of_teacher = self.network_facts(cfg)
        self.pairs = stage_pairs(of_student, of_teacher, own.STAGES)
        widths = [(of_student.channels[i], of_teacher.channels[j]) for i, j in self.pairs]
        with generator_kept():
            self.regressors = nn.ModuleList(mean_regressor(s, t) for s, t in widths)
        start = inverse_softplus(own.INIT_PRED_VAR - own.EPS)
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.full((t,), start), requires_grad=own.LEARN_VARIANCE) for _, t in widths
        )

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps = pick_pairs(features_student, features_teacher, self.pairs)
        stages = zip(self.regressors, self.log_scales, *maps, strict=True)
        loss = sum(vid_loss(regressor, scale, f_s, f_t, self.eps) for regressor, scale, f_s, f_t in stages)
        self.monitors = {
            f"variance_{stage}": predicted_variance(scale.detach(), self.eps).mean()
            for stage, scale in enumerate(self.log_scales, 1)
        }
        return loss


def inverse_softplus(x: float) -> float:
    """``log(exp(x) - 1)`` for x > 0, without overflow."""
    return x + math.log(-math.expm1(-x))


def mean_regressor(s_channels: int, t_channels: int) -> nn.Sequential:
    """The Gaussian's mean: three 1x1 convolutions of the teacher's width."""
    return nn.Sequential(
        nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(t_channels, t_channels, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(t_channels, t_channels, kernel_size=1, bias=False),
    )
