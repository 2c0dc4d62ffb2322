"""RRD: match the distributions of similarities to stored embeddings of the teacher.

Giakoumoglou, Stathaki. Relational Representation Distillation. arXiv:2407.12073. Shapes: B images, D entries of an
embedding, M stored embeddings.

A linear layer projects each network's pooled features to ``FEAT_DIM`` dimensions; the result is normalised. A queue
holds the teacher's last ``K`` embeddings, those of the batch included. The loss is the cross-entropy between the
softmax of the teacher's similarities to the queue, at temperature ``T_T``, and the student's, at ``T_S``
(:func:`rrd_loss`). ``RRD_MOMENTUM`` compares with CRD's memory banks instead, whose scores are exponentials already, as
in the authors' code.

As in the authors' code, the teacher's projection stays at its random start, since the teacher's distribution is a
constant. Here the projection is no trained parameter. Departs from the code: the queue takes batches of any size; its
first entries are rows of length 1, where the code normalises columns; several processes share one queue.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.functional.gather import gather_rows
from mdistiller.options import MANY, WIDEST, Option

from ._base import Distiller, register_distiller
from ._common import feature_losses, generator_kept
from .CRD import DEFAULTS as CRD_DEFAULTS
from .CRD import ContrastMemory, Embed

SHARED = {
    "T_S": Option(0.1, "temperature of the student's similarities", above=0),
    "T_T": Option(0.02, "temperature of the teacher's similarities", above=0),
    "FEAT_DIM": Option(128, "entries of an embedding", at_least=1, at_most=WIDEST),
    "LOSS": feature_losses(1.0),
}
DEFAULTS = {**SHARED, "K": Option(16384, "embeddings in the queue", at_least=1, at_most=MANY)}
DEFAULTS_MOMENTUM = {**SHARED, "MODE": CRD_DEFAULTS["MODE"], "NCE": CRD_DEFAULTS["NCE"]}
PAPER = "Giakoumoglou and Stathaki, 2024, arXiv:2407.12073"


def rrd_loss(similar_s: Tensor, similar_t: Tensor, t_s: float = 0.1, t_t: float = 0.02) -> Tensor:
    """``- sum_m softmax(a_t / t_t)_m log softmax(a_s / t_s)_m``, mean over the batch.

    Args:
        similar_s: a_s ``(B, M)``, the student's similarities to M embeddings; gradient flows.
        similar_t: a_t ``(B, M)``, the teacher's; constant.
        t_s: temperature of the student's.
        t_t: temperature of the teacher's.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: different shapes.

    Example:
        >>> rrd_loss(torch.tensor([[0.1, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.3133)
    """
    require_one_shape("rrd_loss", similar_s, similar_t)
    wanted = (at_least_float32(similar_t.detach()) / t_t).softmax(1)
    return -(wanted * (at_least_float32(similar_s) / t_s).log_softmax(1)).sum(1).mean()


class Queue(nn.Module):
    """The last ``size`` embeddings ``(D,)``, in a ring."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Replace the oldest entries by ``rows`` ``(B, D)``."""
        size = len(self.queue)
        places = (self.queue_ptr + torch.arange(len(rows), device=rows.device)) % size
        self.queue.index_copy_(0, places[-size:], rows[-size:].to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + len(rows)) % size)


class _Projected(Distiller):
    """Projections of both networks' pooled features, and the weighted losses."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg[self.section]
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed_s, self.embed_t = (Embed(width, self.own.FEAT_DIM) for width in (width_s, width_t))
        self.embed_t.requires_grad_(False)

    def similarities(self, embed_s: Tensor, embed_t: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of student and teacher, ``(B, M)`` each. The store is updated."""
        raise NotImplementedError

    def losses(self, image: Tensor, target: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.own
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        with torch.autocast(image.device.type, enabled=False):
            embed_s = self.embed_s(features_student["pooled_feat"])
            embed_t = self.embed_t(features_teacher["pooled_feat"])
            distance = rrd_loss(*self.similarities(embed_s, embed_t, batch), own.T_S, own.T_T)
        return logits_student, {
            "loss_ce": own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": own.LOSS.FEAT_WEIGHT * distance,
        }


@register_distiller("RRD", DEFAULTS, paper=PAPER, family="relation")
class RRD(_Projected):
    """Distributions of similarities to a queue of the teacher's embeddings (:func:`rrd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        with generator_kept():
            self.memory = Queue(self.own.K, self.own.FEAT_DIM)

    def similarities(self, embed_s: Tensor, embed_t: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.memory.push(gather_rows(embed_t))
        stored = self.memory.queue.clone()  # the next push is in place
        return embed_s @ stored.T, embed_t @ stored.T

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(image, target)


@register_distiller("RRD_MOMENTUM", DEFAULTS_MOMENTUM, paper=PAPER, family="relation")
class RRDMomentum(_Projected):
    """RRD with CRD's memory banks; the exponentials of CRD's scores are the similarities (:func:`rrd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int) -> None:
        super().__init__(student, teacher, cfg)
        nce = self.own.NCE
        with generator_kept():
            self.memory = ContrastMemory(self.own.FEAT_DIM, num_data, nce.K, nce.TEMPERATURE, nce.MOMENTUM)

    def similarities(self, embed_s: Tensor, embed_t: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_ratios = self.memory(embed_s, embed_t, batch["index"], batch["contrastive_index"])
        return tuple(log_ratio.exp() for log_ratio in log_ratios)

    def forward_train(
        self, image: Tensor, target: Tensor, index: Tensor, contrastive_index: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(image, target, index=index, contrastive_index=contrastive_index)
