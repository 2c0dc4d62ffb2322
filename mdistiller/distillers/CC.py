"""CC: correlation congruence, differences of embeddings that go together in neighbouring images.

Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang. Correlation Congruence for Knowledge Distillation. ICCV 2019.
arXiv:1904.01802. Shapes: B images, D entries of an embedding.

A linear layer projects each network's pooled features to ``DIM`` entries. With ``d_i = |s_i - t_i|``, the absolute
differences of image i's embeddings, the loss is the mean over neighbours in the batch of ``<d_i, d_(i+1)>``
(:func:`cc_loss`).

The paper compares matrices of a Gaussian kernel, expanded into a Taylor series. This file is the loss of RepDistiller,
whose authors had it from the paper's authors; published comparisons come from that code. The loss has B - 1 terms and
depends on the order of the images. Both layers are trained, the teacher's too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.options import WIDEST, Option

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses

DEFAULTS = {
    "DIM": Option(128, "entries of an embedding", at_least=1, at_most=WIDEST),
    "LOSS": feature_losses(0.02),
}
PAPER = "Peng et al., ICCV 2019, arXiv:1904.01802"


def cc_loss(embed_s: Tensor, embed_t: Tensor) -> Tensor:
    """``sum over i of <|s_i - t_i|, |s_(i+1) - t_(i+1)|> / (B - 1)``, the sum over neighbours in the batch.

    Args:
        embed_s: ``(B, D)``; gradient flows.
        embed_t: ``(B, D)``; gradient flows if it requires one.

    Returns:
        Scalar ``()`` in float32 or better; 0 for equal embeddings, and for a single image.

    Raises:
        InputError: embeddings of different shapes.

    Example:
        >>> cc_loss(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]), torch.zeros(3, 2))
        tensor(2.5000)
    """
    require_one_shape("cc_loss", embed_s, embed_t)
    difference = (at_least_float32(embed_s) - at_least_float32(embed_t)).abs()
    return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)


@register_distiller("CC", DEFAULTS, paper=PAPER, family="relation")
class CC(FeatureDistiller):
    """Differences of projected features that go together in neighbouring images (:func:`cc_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        self.embed_s, self.embed_t = nn.Linear(width_s, cfg.CC.DIM), nn.Linear(width_t, cfg.CC.DIM)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        pooled = features_student["pooled_feat"], features_teacher["pooled_feat"]
        with torch.autocast(pooled[0].device.type, enabled=False):
            return cc_loss(
                *(
                    embed(at_least_float32(x).flatten(1))
                    for embed, x in zip((self.embed_s, self.embed_t), pooled, strict=True)
                )
            )
