"""DCD: a contrastive and a consistency loss on the embeddings of the batch.

Giakoumoglou, Stathaki. Discriminative and Consistent Representation Distillation. arXiv:2407.11802. Sections and
figures are the supplement's, and so is Algorithm 1. Shapes: B images, D entries of an embedding.

A linear layer projects each network's pooled features to ``FEAT_DIM`` dimensions; the result is normalised. With the
similarities ``S = tau * s t^T + b`` ``(B, B)``, the contrastive loss classifies each row of S, the diagonal being the
target. The consistency loss is the KL divergence between the softmax over rows and the softmax over columns. Total:
``CE + LAMBDA * KD + BETA * (contrastive + ALPHA * consistency)``. There is no memory bank: the negatives of an image
are the other images of the batch, including those of its class.

Departs from Algorithm 1 as the authors' code does: the softmax over columns is transposed, so that both sides of the
KL divergence are distributions; the divergence is a mean over the batch.

Text and code leave open the following points, or differ. Our readings:

- ``tau = exp(theta)``, at most ``MAX_TAU``, multiplies. ``theta`` and ``b`` are learned, as the text says
  (``LEARN_TEMPERATURE``); the authors' scripts never give them to the optimiser. They have no weight decay;
- above ``MAX_TAU`` the gradient of ``theta`` is zero, so ``theta`` could never return. It is held just below;
- ``b`` starts at 0 and cancels in both softmaxes. It has no gradient and no effect; checkpoints contain it;
- the target of the consistency term has a gradient, as in the authors' code (``DETACH_TARGET`` removes it);
- ``LAMBDA`` weights :func:`~mdistiller.distillers.KD.kd_loss`: 0 is the paper's DCD, 1 its DCD+KD. The supplement says
  "typically set to 1.0" only;
- negatives come from the batches of all processes, with gradient (``GATHER``). Losses and gradients equal those of one
  process with the global batch;
- both projections are trained, although the text counts no trainable parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.functional.gather import gather_with_gradient
from mdistiller.options import WIDEST, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import generator_kept
from .KD import kd_loss

DEFAULTS = {
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
    "BETA": weight(1.0, "of dcd_loss"),
    "ALPHA": Option(0.5, "factor of the consistency term in dcd_loss", at_least=0),
    "LAMBDA": weight(0.0, "of KD; DCD+KD: 1"),
    "TEMPERATURE": Option(4.0, "temperature of KD", above=0),
    "FEAT_DIM": Option(128, "entries of an embedding", at_least=1, at_most=WIDEST),
    "LEARN_TEMPERATURE": Option(True, "train theta, the logarithm of tau"),
    "INIT_THETA": Option(1.0, "initial theta; tau = exp(theta) = 2.718"),
    "MAX_TAU": Option(10.0, "largest tau", above=0),
    "DETACH_TARGET": Option(False, "no gradient through the target of the consistency term"),
    "GATHER": Option(True, "compare with the images of all processes"),
}
PAPER = "Giakoumoglou and Stathaki, 2024, arXiv:2407.11802"

BELOW = 1e-6  # how far below ln(MAX_TAU) theta is held


def dcd_loss(
    embed_s: Tensor,
    embed_t: Tensor,
    tau: float | Tensor,
    b: float | Tensor,
    alpha: float = 0.5,
    detach_target: bool = False,
) -> Tensor:
    """``CE(S, diagonal) + alpha * KL(C || R)``, mean over the batch (Algorithm 1).

    ``S = tau * embed_s embed_t^T + b``. R is the softmax of S over each row. C is the softmax of S over each column,
    transposed: ``C[i]`` is the distribution over students for teacher i.

    Computed in float32 or better, under autocast too. To compare across processes, gather the embeddings first
    (:func:`~mdistiller.functional.gather.gather_with_gradient`).

    Args:
        embed_s: ``(B, D)`` with rows of length 1; gradient flows.
        embed_t: ``(B, D)`` with rows of length 1, row i for the image of ``embed_s[i]``; gradient flows.
        tau: scale of the similarities, an inverse temperature; gradient flows.
        b: bias of the similarities; cancels.
        alpha: weight of the consistency term.
        detach_target: treat C as a constant.

    Returns:
        Scalar ``()``. For one image, 0.

    Raises:
        InputError: embeddings of different shapes.

    Example:
        >>> embed = torch.eye(3)
        >>> dcd_loss(embed, embed, tau=2.0, b=0.0), dcd_loss(embed, embed.flip(0), tau=2.0, b=0.0)
        (tensor(0.2395), tensor(1.5729))
    """
    require_one_shape("dcd_loss", embed_s, embed_t)
    with torch.autocast(embed_s.device.type, enabled=False):
        logits = at_least_float32(embed_s) @ at_least_float32(embed_t).T * tau + b
        rows, columns = logits.log_softmax(1), logits.log_softmax(0).T
        contrastive = -rows.diagonal().mean()
        if detach_target:
            columns = columns.detach()
        return contrastive + alpha * F.kl_div(rows, columns, reduction="batchmean", log_target=True)


def bounded_scale(theta: Tensor, max_tau: float) -> Tensor:
    """``min(exp(theta), max_tau)`` for ``theta`` ``()``. There is no gradient above the bound."""
    return theta.exp().clamp(max=max_tau)


@register_distiller("DCD", DEFAULTS, paper=PAPER, family="feature")
class DCD(Distiller):
    """Contrastive loss and consistency loss on projected features of the batch (:func:`dcd_loss`).

    KD is added where ``LAMBDA`` is not 0.
    """

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.DCD
        self.ce_weight, self.beta, self.alpha, self.kd_weight = own.CE_WEIGHT, own.BETA, own.ALPHA, own.LAMBDA
        self.temperature, self.max_tau = own.TEMPERATURE, own.MAX_TAU
        self.learn_temperature, self.detach_target = own.LEARN_TEMPERATURE, own.DETACH_TARGET
        self.gather = own.GATHER
        if self.detach_target and not self.alpha:
            raise InputError(
                "DCD.DETACH_TARGET has no effect without the consistency term (DCD.ALPHA 0); leave it at False"
            )
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed_s = nn.Linear(width_s, own.FEAT_DIM)
            self.embed_t = nn.Linear(width_t, own.FEAT_DIM)
        self.theta = nn.Parameter(torch.tensor(float(own.INIT_THETA)), requires_grad=self.learn_temperature)
        self.b = nn.Parameter(torch.zeros(()), requires_grad=self.learn_temperature)

    def parameter_groups(self, cfg: Any) -> list[dict[str, Any]]:
        """``theta`` and ``b`` without weight decay, the rest as usual."""
        scale = [self.theta, self.b]
        rest = [p for p in self.get_learnable_parameters() if all(p is not q for q in scale)]
        groups = [{"params": rest}]
        if self.learn_temperature:
            groups.append({"params": scale, "weight_decay": 0.0})
        return groups

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        losses = {"loss_ce": self.ce_weight * F.cross_entropy(logits_student, target)}
        if self.kd_weight:
            losses["loss_kd"] = self.kd_weight * kd_loss(logits_student, logits_teacher, self.temperature)
        with torch.autocast(image.device.type, enabled=False):
            embed_s = self.embed(self.embed_s, features_student)
            embed_t = self.embed(self.embed_t, features_teacher)
            if self.gather:
                embed_s, embed_t = gather_with_gradient(embed_s), gather_with_gradient(embed_t)
            losses["loss_dcd"] = self.beta * dcd_loss(
                embed_s, embed_t, self.tau(), self.b, self.alpha, self.detach_target
            )
        return logits_student, losses

    @staticmethod
    def embed(projection: nn.Linear, features: dict[str, Any]) -> Tensor:
        """Rows of length 1, ``(B, FEAT_DIM)``."""
        return F.normalize(projection(at_least_float32(features["pooled_feat"])), dim=1)

    def tau(self) -> Tensor:
        """The scale, also a monitor. A learned ``theta`` is first held below the bound."""
        if self.learn_temperature:
            with torch.no_grad():
                self.theta.clamp_(max=math.log(self.max_tau) - BELOW)
        tau = bounded_scale(self.theta, self.max_tau)
        self.monitors = {"tau": tau.detach()}
        return tau
