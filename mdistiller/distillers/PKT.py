"""PKT: probabilistic knowledge transfer, match conditional distributions of cosine similarities within a batch.

Passalis, Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018. arXiv:1803.10837.
Shapes: B images, D entries of an embedding.

The cosines of the pooled features, scaled to [0, 1], give the probability that image j is a neighbour of image i. The
loss is the KL divergence of the student's probabilities from the teacher's.

Departs from the paper, as the authors' code and mdistiller do: an image is a neighbour of itself, and the divergence is
a mean over the B x B pairs, not a sum. The weight 30000 belongs to the mean. Departs from mdistiller
(docs/differences.md): the gradient of an embedding of zeros is finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdistiller.functional import at_least_float32, require_same_images

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses

DEFAULTS = {"LOSS": feature_losses(30000.0)}
PAPER = "Passalis and Tefas, ECCV 2018, arXiv:1803.10837"


def neighbour_probabilities(embed: Tensor, eps: float = 1e-7) -> Tensor:
    """``P[i, j] = K[i, j] / sum_j K[i, j]`` with the cosine kernel ``K = (cos + 1) / 2``.

    Args:
        embed: ``(B, D)``; gradient flows. A row of zeros has no direction and no gradient.
        eps: added to lengths.

    Returns:
        ``(B, B)`` in float32 or better, rows of sum 1. Row i: the images as neighbours of image i.
    """
    with torch.autocast(embed.device.type, enabled=False):
        embed = at_least_float32(embed)
        length = torch.linalg.vector_norm(embed, dim=1, keepdim=True)
        direction = embed.masked_fill(length == 0, 0) / (length + eps)
        kernel = (direction @ direction.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """``mean over i, j of P_t log(P_t / P_s)``, P the :func:`neighbour_probabilities`.

    Args:
        f_s: ``(B, D_s)``; gradient flows.
        f_t: ``(B, D_t)``; gradient flows if it requires one.
        eps: added to lengths, and to both probabilities in the logarithm.

    Returns:
        Scalar ``()`` in float32 or better; 0 for equal cosines.

    Raises:
        InputError: embeddings of different numbers of images.

    Example:
        >>> f_s, f_t = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> pkt_loss(f_s, f_t)
        tensor(0.0283)
    """
    require_same_images("pkt_loss", f_s, f_t)
    p_s, p_t = neighbour_probabilities(f_s, eps), neighbour_probabilities(f_t, eps)
    return (p_t * torch.log((p_t + eps) / (p_s + eps))).mean()


@register_distiller("PKT", DEFAULTS, paper=PAPER, family="relation")
class PKT(FeatureDistiller):
    """KL divergence of the batch's cosine-similarity distributions (:func:`pkt_loss`)."""

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return pkt_loss(features_student["pooled_feat"], features_teacher["pooled_feat"])
