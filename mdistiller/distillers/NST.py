"""NST: match the channels' activation patterns by maximum mean discrepancy (MMD): neuron selectivity transfer.

Huang, Wang. Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. 2017. arXiv:1707.01219.

Each channel of a stage, over its positions, is a unit vector: a sample of where a neuron fires. The two sets of
samples are compared by squared maximum mean discrepancy with the polynomial kernel ``(x . y)^2``, summed over the
stages. Shapes: B images, C channels, H, W positions.

Departs from the paper, as mdistiller does: the larger of two maps is pooled to the smaller. Departs from mdistiller
(docs/differences.md): which maps are compared where the networks have different numbers of them (``STAGES``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import pool_to_common, unit

from ._base import register_distiller
from ._common import STAGES, FeatureDistiller, feature_losses, pick_pairs, stage_pairs

DEFAULTS = {
    "STAGES": STAGES,
    "LOSS": feature_losses(50.0),
}
PAPER = "Huang and Wang, 2017, arXiv:1707.01219"


def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the polynomial kernel ``(a_i . b_j)^2`` over images and pairs of channels.

    ``sum_ij (a_i . b_j)^2 = <A^T A, B^T B>``: of the C_a x C_b products and the P x P second moments, the smaller is
    computed. mdistiller's form holds C_a x C_b x P numbers for each image.

    Args:
        a: ``(B, C_a, P)``; gradient flows.
        b: ``(B, C_b, P)``; gradient flows.

    Returns:
        Scalar ``()``.
    """
    images, c_a, positions = a.shape
    c_b = b.shape[1]
    if c_a * c_b <= positions**2:
        return (a @ b.mT).square().mean()
    return ((a.mT @ a) * (b.mT @ b)).sum() / (images * c_a * c_b)


def single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels of two maps.

    Args:
        f_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        f_t: ``(B, C_t, H_t, W_t)``; constant.

    Returns:
        Scalar ``()``, 0 where both sets of channels have equal second moments, equal sets above all.
    """
    with torch.autocast(f_s.device.type, enabled=False):
        f_s, f_t = (unit(x.flatten(2)) for x in pool_to_common(f_s, f_t.detach()))
        return kernel_mean(f_t, f_t) + kernel_mean(f_s, f_s) - 2 * kernel_mean(f_s, f_t)


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """:func:`single_stage_nst_loss`, summed over pairs of maps.

    Args:
        g_s: the student's maps, ``(B, C_s, H_s, W_s)`` each; gradient flows.
        g_t: the teacher's, as many; constant.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: maps of unequally many images.
        ValueError: lists of different length.
    """
    return sum(single_stage_nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True))


@register_distiller("NST", DEFAULTS, paper=PAPER, family="feature")
class NST(FeatureDistiller):
    """Neuron selectivity transfer: MMD between the channels' activation patterns (:func:`nst_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.pairs = stage_pairs(*self.network_facts(cfg), cfg.NST.STAGES)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps_s, maps_t = pick_pairs(features_student, features_teacher, self.pairs)
        return nst_loss(maps_s, maps_t)
