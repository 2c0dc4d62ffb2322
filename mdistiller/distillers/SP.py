"""SP: similarity-preserving KD, match the similarities between the images of a batch.

Tung, Mori. Similarity-Preserving Knowledge Distillation. ICCV 2019. arXiv:1907.09682. Shapes: B images.

``G`` holds the scalar products of all pairs of the batch's last maps, each row at length 1 (Eq. 1, 2); the squared
difference of the two networks' is the loss (Eq. 3). The maps need not have the same shape.

Departs from the paper: only the last map is used (mdistiller; so do the paper's experiments with one pair of layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller.functional import at_least_float32, require_same_images, unit

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses

DEFAULTS = {"LOSS": feature_losses(3000.0)}
PAPER = "Tung and Mori, ICCV 2019, arXiv:1907.09682"


def similarity_matrix(feat: Tensor) -> Tensor:
    """Scalar products of all pairs of images, each row at length 1 (Eq. 1).

    Args:
        feat: ``(B, ...)``.

    Returns:
        ``(B, B)`` in float32 or better; the row of an image whose features are all zero is zero.
    """
    with torch.autocast(feat.device.type, enabled=False):
        rows = at_least_float32(feat).flatten(1)
        return unit(rows @ rows.T)


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Squared difference of the similarities, mean over the B x B pairs (Eq. 3 for one pair of layers).

    Args:
        f_s: ``(B, ...)``; gradient flows.
        f_t: ``(B, ...)``, of any shape; gradient flows where it carries one.

    Returns:
        Scalar ``()``, from 0 to 4 / B.

    Raises:
        InputError: features of unequally many images.
    """
    require_same_images("similarity_loss", f_s, f_t)
    return (similarity_matrix(f_s) - similarity_matrix(f_t)).square().mean()


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """:func:`similarity_loss`, summed over pairs of layers (Eq. 3).

    Args:
        g_s: the student's features, ``(B, ...)`` each; gradient flows.
        g_t: the teacher's, as many; gradient flows where they carry one.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: features of unequally many images.
        ValueError: lists of different length.
    """
    return sum(similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True))


@register_distiller("SP", DEFAULTS, paper=PAPER, family="relation")
class SP(FeatureDistiller):
    """Distance of the batch's pairwise similarity matrices (:func:`sp_loss`, Eq. 4)."""

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return sp_loss([features_student["feats"][-1]], [features_teacher["feats"][-1]])
