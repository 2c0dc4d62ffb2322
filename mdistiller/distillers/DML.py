"""DML: two students train from scratch and learn from each other.

Zhang, Xiang, Hospedales, Lu. Deep Mutual Learning. CVPR 2018. arXiv:1706.00384. Shapes: B images, K classes.

Each network's loss is its cross-entropy plus the KL divergence of the other's prediction from its own, at temperature
1 and without gradient to the other (:func:`dml_losses`). There is no teacher. ``DISTILLER.PEER`` names the second
network; the tables' DML takes the teacher's architecture, from scratch, which is our reading: a pretrained peer is
``DISTILLER.PEER_CKPT``. ``DEPLOYED`` says which of the two is scored and saved; the tables score the student.

Departs from the paper, as public codes do: both networks take a step of one loss, computed from the same predictions;
the paper predicts again between the steps. Both have the optimiser's settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.options import Option, weight

from ._base import Distiller, register_distiller
from .KD import kd_loss

DEFAULTS = {
    "DEPLOYED": Option("student", "the network that is scored and saved", one_of=("student", "peer")),
    "LOSS": {
        "CE_WEIGHT": weight(1.0, "of both cross-entropies"),
        "KD_WEIGHT": weight(1.0, "of both KL divergences"),
    },
}
PAPER = "Zhang et al., CVPR 2018, arXiv:1706.00384"


def dml_losses(logits: Sequence[Tensor]) -> list[Tensor]:
    """``KL(p_j || p_i)`` of each network i, mean over the other networks j and over the batch.

    Args:
        logits: ``(B, K)`` of each network, at least two. Gradient flows to network i from its own loss only.

    Returns:
        One scalar ``()`` for each network, in float32 or better.

    Raises:
        InputError: logits of different shapes.

    Example:
        >>> dml_losses([torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])])
        [tensor(0.6031), tensor(1.3250)]
    """
    return [
        sum(kd_loss(own, other.detach(), 1.0) for j, other in enumerate(logits) if j != i) / (len(logits) - 1)
        for i, own in enumerate(logits)
    ]


@register_distiller("DML", DEFAULTS, paper=PAPER, family="logit")
class DML(Distiller):
    """Two networks that learn from each other (:func:`dml_losses`)."""

    mixed_labels = True
    networks: ClassVar = {"peer": "student"}

    def __init__(self, student: nn.Module, peer: nn.Module, cfg: Any) -> None:
        super().__init__(student)
        self.peer = peer
        self.own = cfg.DML

    def deployed(self) -> nn.Module:
        return self.peer if self.own.DEPLOYED == "peer" else self.student

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = [network(image)[0] for network in (self.student, self.peer)]
        distances = dml_losses(logits)
        losses = {}
        for name, own_logits, distance in zip(("", "_peer"), logits, distances, strict=True):
            losses[f"loss_ce{name}"] = self.own.LOSS.CE_WEIGHT * F.cross_entropy(own_logits, target)
            losses[f"loss_kd{name}"] = self.own.LOSS.KD_WEIGHT * distance
        return logits[self.own.DEPLOYED == "peer"], losses
