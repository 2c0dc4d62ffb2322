"""SP: similarity-preserving KD, match the similarities between the images of a batch.

Tung, Mori. Similarity-Preserving Knowledge Distillation. ICCV 2019. arXiv:1907.09682. Shapes: B images.

``G`` holds the scalar products of all pairs of the batch's last maps, with rows normalised to length 1 (Eq. 1, 2). The
loss is the squared difference of both networks' G (Eq. 3). The maps may have different shapes.

Departs from the paper: only the last map is used, as in mdistiller and in the paper's experiments with one pair of
layers.
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
    """``G[i] = unit(A A^T)[i]``, A the flattened features: scalar products of images, rows of length 1 (Eq. 1).

    Args:
        feat: ``(B, ...)``; gradient flows.

    Returns:
        ``(B, B)`` in float32 or better. An image whose features are all zero has a row of zeros.
    """
    with torch.autocast(feat.device.type, enabled=False):
        rows = at_least_float32(feat).flatten(1)
        return unit(rows @ rows.T)


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """``mean((G_s - G_t)^2)`` over the B x B pairs (Eq. 3 for one pair of layers; :func:`similarity_matrix`).

    Args:
        f_s: ``(B, ...)``; gradient flows.
        f_t: ``(B, ...)``, other shape allowed; gradient flows if it requires one.

    Returns:
        Scalar ``()``, from 0 to 4 / B.

    Raises:
        InputError: features of different numbers of images.

    Example:
        >>> f_s, f_t = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity_loss(f_s, f_t)
        tensor(0.2929)
    """
    require_same_images("similarity_loss", f_s, f_t)
    return (similarity_matrix(f_s) - similarity_matrix(f_t)).square().mean()


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """``sum over layers of mean((G_s - G_t)^2)`` (Eq. 3; :func:`similarity_loss`).

    Args:
        g_s: the student's features, ``(B, ...)`` each; gradient flows.
        g_t: the teacher's features, the same number; gradient flows if they require one.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: features of different numbers of images.
        ValueError: lists of different length.

    Example:
        >>> maps_s, maps_t = [torch.ones(2, 4, 8, 8)], [torch.eye(2).view(2, 2, 1, 1)]
        >>> sp_loss(maps_s, maps_t)
        tensor(0.2929)
    """
    return sum(similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True))


@register_distiller("SP", DEFAULTS, paper=PAPER, family="relation")
class SP(FeatureDistiller):
    """Distance of the batch's pairwise similarity matrices (:func:`sp_loss`, Eq. 4)."""

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return sp_loss([features_student["feats"][-1]], [features_teacher["feats"][-1]])
