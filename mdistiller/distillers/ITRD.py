"""ITRD: raise the correlation of each feature with the teacher's, and the mutual information of the batch's relations.

Miles, Lopez Rodriguez, Mikolajczyk. Information Theoretic Representation Distillation. BMVC 2022. arXiv:2112.00459.
Shapes: B images, D entries of the teacher's pooled features.

- correlation loss (:func:`correlation_loss`): ``log2 sum_d |c_d - 1|^(2 ALPHA)``, c_d the correlation over the batch of
  entry d of both networks;
- mutual information loss (:func:`mutual_loss`): ``sum(G_s^2) - sum(G_st^2)``, G the Gram matrices of unit vectors,
  divided by their trace, and ``G_st`` those of the entry-wise product.

A linear layer takes the student's features to D entries. As in the authors' code, the mutual information loss uses the
layer only if the widths differ.

The code's defaults are ALPHA 1.5, CORR_WEIGHT 2 and MUTUAL_WEIGHT 0.05; the command in its README has ALPHA 1.01 and
MUTUAL_WEIGHT 1, and so have the configs here. The authors publish no values by pair. Departs from the code: an entry
that is constant in the batch, of which the code has NaN, correlates with nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, require_same_images, unit
from mdistiller.options import Option, weight

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses, generator_kept

DEFAULTS = {
    "ALPHA": Option(1.5, "half the exponent of the correlation loss", above=0.5),
    "CORR_WEIGHT": weight(2.0, "of the correlation loss in the distance of the features"),
    "MUTUAL_WEIGHT": weight(0.05, "of the mutual information loss in the distance of the features"),
    "LOSS": feature_losses(1.0),
}
PAPER = "Miles et al., BMVC 2022, arXiv:2112.00459"


def standardised(z: Tensor) -> Tensor:
    """``(z - mean) / deviation`` of each entry over the batch ``(B, D)``; the deviation is unbiased.

    An entry that is constant in the batch becomes zeros.
    """
    centred = z - z.mean(0)
    return unit(centred, dim=0) * max(len(z) - 1, 1) ** 0.5


def correlation_loss(z_s: Tensor, z_t: Tensor, alpha: float = 1.5) -> Tensor:
    """``log2 sum_d |c_d - 1|^(2 alpha)``; ``c_d = sum over images of u_s[d] u_t[d] / B``, u of :func:`standardised`.

    Args:
        z_s: ``(B, D)``; gradient flows.
        z_t: ``(B, D)``; constant.
        alpha: above 0.5.

    Returns:
        Scalar ``()`` in float32 or better. Equal features have c = (B - 1) / B.

    Raises:
        InputError: features of different shapes.

    Example:
        >>> z_s, z_t = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])
        >>> correlation_loss(z_s, z_t), correlation_loss(z_t, z_t)
        (tensor(1.7549), tensor(-3.))
    """
    require_one_shape("correlation_loss", z_s, z_t)
    z_s, z_t = at_least_float32(z_s), at_least_float32(z_t.detach())
    correlation = (standardised(z_s) * standardised(z_t)).sum(0) / len(z_s)
    return (correlation - 1).abs().pow(2 * alpha).sum().log2()


def mutual_loss(z_s: Tensor, z_t: Tensor) -> Tensor:
    """``sum(G_s^2) - sum(G_st^2)``; ``G = K / trace(K)``, K_s the cosines of all pairs of images, ``K_st = K_s K_t``.

    Args:
        z_s: ``(B, D)``; gradient flows.
        z_t: ``(B, D')``, other width allowed; constant.

    Returns:
        Scalar ``()`` in float32 or better, 0 or more.

    Raises:
        InputError: features of different numbers of images.

    Example:
        >>> z_s, z_t = torch.ones(2, 1), torch.eye(2)
        >>> mutual_loss(z_s, z_t), mutual_loss(z_t, z_t)
        (tensor(0.5000), tensor(0.))
    """
    require_same_images("mutual_loss", z_s, z_t)
    with torch.autocast(z_s.device.type, enabled=False):
        k_s, k_t = (
            cosines @ cosines.T for cosines in map(unit, (at_least_float32(z_s), at_least_float32(z_t.detach())))
        )
    joint = k_s * k_t
    return _over_its_trace(k_s).square().sum() - _over_its_trace(joint).square().sum()


def _over_its_trace(gram: Tensor) -> Tensor:
    trace = gram.trace()
    return gram / trace.masked_fill(trace == 0, 1)


@register_distiller("ITRD", DEFAULTS, paper=PAPER, family="relation")
class ITRD(FeatureDistiller):
    """Correlation and mutual information of pooled features (:func:`correlation_loss`, :func:`mutual_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        own = cfg.ITRD
        self.alpha, self.corr_weight, self.mutual_weight = own.ALPHA, own.CORR_WEIGHT, own.MUTUAL_WEIGHT
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed = nn.Linear(width_s, width_t)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        pooled_s, pooled_t = (at_least_float32(f["pooled_feat"]) for f in (features_student, features_teacher))
        with torch.autocast(pooled_s.device.type, enabled=False):
            embedded = self.embed(pooled_s)
            related = pooled_s if pooled_s.shape == pooled_t.shape else embedded
            correlation = correlation_loss(embedded, pooled_t, self.alpha)
            return self.corr_weight * correlation + self.mutual_weight * mutual_loss(related, pooled_t)
