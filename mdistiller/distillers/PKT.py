"""PKT: probabilistic knowledge transfer, match conditional distributions of cosine similarities within a batch.

Passalis, Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018. arXiv:1803.10837.
Shapes: B images, D entries of an embedding.

Cosines of the pooled features, brought to [0, 1], are the probability that an image has another as its neighbour; the
student's are drawn to the teacher's by KL divergence.

Departs from the paper, as the authors' code and mdistiller do: an image is a neighbour of itself, and the divergence
is a mean over the B x B pairs, not a sum over the others: hence the weight of 30000. Departs from mdistiller
(docs/differences.md): the gradient is finite at an embedding of zeros.
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
    """Row i: the probabilities of the batch's images as neighbours of image i, by the cosine kernel ``(cos + 1) / 2``.

    Args:
        embed: ``(B, D)``; gradient flows, but not to rows of zeros, whose direction is undefined.
        eps: added to lengths.

    Returns:
        ``(B, B)`` in float32 or better, rows of sum 1.
    """
    with torch.autocast(embed.device.type, enabled=False):
        embed = at_least_float32(embed)
        length = torch.linalg.vector_norm(embed, dim=1, keepdim=True)
        direction = embed.masked_fill(length == 0, 0) / (length + eps)
        kernel = (direction @ direction.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """KL(teacher || student) of the neighbours' probabilities, mean over the B x B pairs.

    Args:
        f_s: ``(B, D_s)``; gradient flows.
        f_t: ``(B, D_t)``; gradient flows where it carries one.
        eps: added to lengths and to the probabilities in the logarithm.

    Returns:
        Scalar ``()``, 0 for equal cosines.

    Raises:
        InputError: embeddings of unequally many images.
    """
    require_same_images("pkt_loss", f_s, f_t)
    p_s, p_t = neighbour_probabilities(f_s, eps), neighbour_probabilities(f_t, eps)
    return (p_t * torch.log((p_t + eps) / (p_s + eps))).mean()


@register_distiller("PKT", DEFAULTS, paper=PAPER, family="relation")
class PKT(FeatureDistiller):
    """KL divergence of the batch's cosine-similarity distributions (:func:`pkt_loss`)."""

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return pkt_loss(features_student["pooled_feat"], features_teacher["pooled_feat"])
