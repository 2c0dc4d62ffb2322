"""RKD: match the distances between images' embeddings and the angles in triangles of images.

Park, Kim, Lu, Cho. Relational Knowledge Distillation. CVPR 2019. arXiv:1904.05068. Shapes: B images, D entries of an
embedding, the pooled features.

- RKD-D: distances of all pairs, divided by their mean;
- RKD-A: cosines of the angles of all triples.

The Huber loss compares each with the teacher's.

Departs from the paper, as mdistiller does: the means include pairs of an image with itself and triples with repeated
images, although these are equal in both networks. Departs from mdistiller (docs/differences.md): distances are
computed from the differences. mdistiller's ``|a|^2 + |b|^2 - 2 a.b`` in float32 cannot tell near images apart. Equal
images have a finite gradient, and a batch of one image has the loss 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_same_images, unit
from mdistiller.options import Option, weight

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses

DEFAULTS = {
    "DISTANCE_WEIGHT": weight(25.0, "of RKD-D in the distance of the features"),
    "ANGLE_WEIGHT": weight(50.0, "of RKD-A in the distance of the features"),
    "LOSS": feature_losses(1.0),
    "PDIST": {
        "EPSILON": Option(1e-12, "smallest squared distance", above=0),
        "SQUARED": Option(False, "compare squared distances"),
    },
}
PAPER = "Park et al., CVPR 2019, arXiv:1904.05068"


def differences(embed: Tensor) -> Tensor:
    """``embed[j] - embed[i]`` at ``[i, j]``: ``(B, B, D)`` for ``(B, D)``."""
    return embed[None] - embed[:, None]


def relative_distances(difference: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """``||x_j - x_i|| / mean``, for all pairs. The mean is over pairs of different images.

    Args:
        difference: ``(B, B, D)``; gradient flows, also through the mean.
        squared: take squared distances.
        eps: the least squared distance of different images; a smaller one has no gradient.

    Returns:
        ``(B, B)`` with zeros on the diagonal.
    """
    distance = difference.square().sum(2).clamp(min=eps)
    if not squared:
        distance = distance.sqrt()
    images = len(distance)
    distance = distance * (1 - torch.eye(images, dtype=distance.dtype, device=distance.device))
    return distance / (distance.sum() / max(images * (images - 1), 1)).clamp(min=torch.finfo(distance.dtype).tiny)


def angles(difference: Tensor) -> Tensor:
    """Cosines of the angles of all triples, at the first image. Equal images give 0.

    Args:
        difference: ``(B, B, D)``; gradient flows.

    Returns:
        ``(B, B, B)``.
    """
    direction = unit(difference)
    return direction @ direction.mT


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """``distance_weight * mean h(d_s - d_t) + angle_weight * mean h(a_s - a_t)``, h the Huber loss with delta 1.

    d are the relative distances of all pairs, a the cosines of the angles of all triples. Plain form:
    tests/oracles/rkd.py.

    Args:
        f_s: ``(B, ...)``; gradient flows.
        f_t: ``(B, ...)``; constant.
        squared: compare squared distances.
        eps: the least squared distance, in squared units of the embeddings.
        distance_weight: of RKD-D.
        angle_weight: of RKD-A.

    Returns:
        Scalar ``()`` in float32 or better. Shift, rotation and scale of the student's embeddings do not change the
        loss.

    Raises:
        InputError: embeddings of different numbers of images.

    Example:
        >>> f_s, f_t = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
        >>> rkd_loss(f_s, 2 * f_s), rkd_loss(f_s, f_t)
        (tensor(0.), tensor(0.3472))
    """
    require_same_images("rkd_loss", f_s, f_t)
    with torch.autocast(f_s.device.type, enabled=False):
        student = differences(at_least_float32(f_s).flatten(1))
        teacher = differences(at_least_float32(f_t).detach().flatten(1))
        distance = F.smooth_l1_loss(
            relative_distances(student, squared, eps), relative_distances(teacher, squared, eps)
        )
        angle = F.smooth_l1_loss(angles(student), angles(teacher))
        return distance_weight * distance + angle_weight * angle


@register_distiller("RKD", DEFAULTS, paper=PAPER, family="relation")
class RKD(FeatureDistiller):
    """Distances and angles between the images' embeddings (:func:`rkd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        own = cfg.RKD
        self.distance_weight, self.angle_weight = own.DISTANCE_WEIGHT, own.ANGLE_WEIGHT
        self.eps, self.squared = own.PDIST.EPSILON, own.PDIST.SQUARED

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        return rkd_loss(
            features_student["pooled_feat"],
            features_teacher["pooled_feat"],
            self.squared,
            self.eps,
            self.distance_weight,
            self.angle_weight,
        )
