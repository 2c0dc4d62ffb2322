"""NST: neuron selectivity transfer, match the channels' activation patterns by maximum mean discrepancy (MMD).

Huang, Wang. Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. 2017. arXiv:1707.01219.
Shapes: B images, C channels, H, W positions.

Each channel of a stage is a vector over positions, normalised to length 1: a sample of a neuron's selectivity. The loss
is the squared MMD between the student's and the teacher's samples with the polynomial kernel ``(x . y)^2``, summed over
the stages.

Departs from the paper, as mdistiller does: the larger of two maps is pooled to the smaller size. Departs from
mdistiller (docs/differences.md): the choice of maps for networks with different numbers of maps (``STAGES``).
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
    """``mean (a_i . b_j)^2`` over images and pairs of channels.

    ``sum_ij (a_i . b_j)^2 = <A^T A, B^T B>``. The code computes the smaller of both: C_a x C_b products or P x P second
    moments. mdistiller's form stores C_a x C_b x P numbers for each image.

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
    """``mean k(t, t') + mean k(s, s') - 2 mean k(s, t)``, ``k(x, y) = (x . y)^2``: squared MMD of two maps' channels.

    Plain form: tests/oracles/nst.py.

    Args:
        f_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        f_t: ``(B, C_t, H_t, W_t)``; constant.

    Returns:
        Scalar ``()`` in float32 or better; 0 if both sets of channels have equal second moments.

    Raises:
        InputError: the maps have different numbers of images.

    Example:
        >>> f_s, f_t = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> single_stage_nst_loss(f_s, f_t)
        tensor(2.)
    """
    with torch.autocast(f_s.device.type, enabled=False):
        f_s, f_t = (unit(x.flatten(2)) for x in pool_to_common(f_s, f_t.detach()))
        return kernel_mean(f_t, f_t) + kernel_mean(f_s, f_s) - 2 * kernel_mean(f_s, f_t)


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """``sum over stages of MMD^2`` (:func:`single_stage_nst_loss`).

    Args:
        g_s: the student's maps, ``(B, C_s, H_s, W_s)`` each; gradient flows.
        g_t: the teacher's maps, the same number; constant.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: maps with different numbers of images.
        ValueError: lists of different length.

    Example:
        >>> maps_s, maps_t = [torch.eye(4).view(1, 4, 2, 2)], [torch.ones(1, 8, 2, 2)]
        >>> nst_loss(maps_s, maps_t)
        tensor(0.7500)
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
