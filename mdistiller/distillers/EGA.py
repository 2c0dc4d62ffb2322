"""EGA: align the graph of the student's embeddings with the teacher's.

Ma, Chen, Akata. Distilling Knowledge from Self-Supervised Teacher by Embedding Graph Alignment. BMVC 2022.
arXiv:2211.13264. Shapes: B images, D entries of an embedding, the pooled features.

``P(a, b)`` ``(B, B)`` holds the Pearson correlations of all pairs of embeddings. Nodes: ``P(t, s)`` should be the
identity. Edges: ``P(s, s)`` should be ``P(t, t)``. The loss is the sum of both differences' Frobenius norms
(:func:`ega_loss`).

The embeddings must have one width; for networks of different widths a linear layer takes the student's to the
teacher's, which is our reading. The public code of DCD's and RRD's authors, with which this file was compared, leaves
the weight of the whole loss open; 1 is our reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, unit
from mdistiller.options import weight

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses, generator_kept

DEFAULTS = {
    "NODE_WEIGHT": weight(1.0, "of the nodes in the distance of the features"),
    "EDGE_WEIGHT": weight(0.3, "of the edges in the distance of the features"),
    "LOSS": feature_losses(1.0),
}
PAPER = "Ma et al., BMVC 2022, arXiv:2211.13264"


def ega_loss(f_s: Tensor, f_t: Tensor, node_weight: float = 1.0, edge_weight: float = 0.3) -> Tensor:
    """``node_weight * ||P(t, s) - I|| + edge_weight * ||P(s, s) - P(t, t)||``, P the Pearson correlations.

    Args:
        f_s: ``(B, D)``; gradient flows.
        f_t: ``(B, D)``; constant.
        node_weight: of the first norm.
        edge_weight: of the second norm.

    Returns:
        Scalar ``()`` in float32 or better; a norm that is 0 has no gradient.

    Raises:
        InputError: embeddings of different shapes.

    Example:
        >>> f_s, f_t = torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> ega_loss(f_s, f_t)
        tensor(3.2980)
    """
    require_one_shape("ega_loss", f_s, f_t)
    with torch.autocast(f_s.device.type, enabled=False):
        s, t = (unit(f - f.mean(1, keepdim=True)) for f in (at_least_float32(f_s), at_least_float32(f_t.detach())))
        node = t @ s.T - torch.eye(len(s), dtype=s.dtype, device=s.device)
        edge = s @ s.T - t @ t.T
        return node_weight * node.norm() + edge_weight * edge.norm()


@register_distiller("EGA", DEFAULTS, paper=PAPER, family="relation")
class EGA(FeatureDistiller):
    """Correlations between the embeddings of both networks and within each (:func:`ega_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.node_weight, self.edge_weight = cfg.EGA.NODE_WEIGHT, cfg.EGA.EDGE_WEIGHT
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed = nn.Identity() if width_s == width_t else nn.Linear(width_s, width_t)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        pooled_s = at_least_float32(features_student["pooled_feat"])
        with torch.autocast(pooled_s.device.type, enabled=False):
            embedded = self.embed(pooled_s)
        return ega_loss(embedded, features_teacher["pooled_feat"], self.node_weight, self.edge_weight)
