"""CRCD: complementary relation contrastive distillation, contrast of relations between images.

Zhu, Tang, Chen, Yu, Liu, Rong, Yang, Wang. Complementary Relation Contrastive Distillation. CVPR 2021.
arXiv:2103.16367. Shapes: N training images, B images in a batch, D entries of an embedding, K negatives of an image.

As in CRD, a linear layer projects each network's pooled features to rows of length 1, and two memory banks hold an
embedding of every training image. A relation is the direction ``unit(x - anchor + 1e-6)``; the anchors are the banks'
entries of the batch's own images. For each image and each anchor, the student's relation is contrasted with the
relations of the teacher bank's entries (the image's own, and K negatives) by CRD's NCE loss; likewise the teacher's
relation with the student bank's (:func:`relations`). There are ``B B (K + 1)`` scores.

Gradient element (``GRADIENT``): ``1 - mean cosine`` of both networks' gradients of the cross-entropy with respect to
the pooled features (:func:`gradient_loss`), which needs pooled features of one width; other pairs go without.

The last epochs train on the labels alone (``MIMIC_SHARE``). The file follows the code of an author, which calls itself
incomplete: it lacks the paper's relation networks, does not run as published, and multiplies the gradient element with
the KD term (``GRADIENT product``), where this file adds it (``sum``). Its teacher is in training mode; here it is not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import require_one_shape
from mdistiller.messages import warn
from mdistiller.options import MANY, WIDEST, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from .CRD import ContrastMemory, Embed, nce_loss
from .KD import kd_loss

DEFAULTS = {
    "DIM": Option(128, "entries of an embedding", at_least=1, at_most=WIDEST),
    "T": Option(4.0, "temperature of KD", above=0),
    "GRADIENT": Option("sum", "how the gradient element enters; product: with KD, as published",
                       one_of=("sum", "product", "off")),
    "MIMIC_SHARE": Option(0.96, "share of the epochs with the method's own terms", at_least=0, at_most=1),
    "NCE": {
        "K": Option(500, "negatives of each image", at_least=1, at_most=MANY),
        "MOMENTUM": Option(0.5, "share of the old entry that a bank keeps", at_least=0, below=1),
        "TEMPERATURE": Option(0.05, "divides the similarities", above=0),
    },
    "LOSS": {
        "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
        "KD_WEIGHT": weight(0.9, "of kd_loss"),
        "FEAT_WEIGHT": weight(1.0, "of the contrast of relations"),
        "GRADIENT_WEIGHT": weight(9.0, "of the gradient element; published: 10, times the weighted KD term"),
    },
}  # fmt: skip
PAPER = "Zhu et al., CVPR 2021, arXiv:2103.16367"

SHIFT = 1e-6  # added to differences, as in the authors' code: equal vectors have the direction (1, .., 1)


def relations(x: Tensor, anchors: Tensor) -> Tensor:
    """``unit(x_b - anchor_a + 1e-6)``.

    Args:
        x: ``(B, ..., D)``; gradient flows.
        anchors: ``(A, D)``.

    Returns:
        ``(A, B, ..., D)``.
    """
    apart = x[None] - anchors.view(len(anchors), *[1] * (x.ndim - 1), -1) + SHIFT
    return apart / torch.linalg.vector_norm(apart, dim=-1, keepdim=True)


def gradient_loss(logits_s: Tensor, weight_s: Tensor, logits_t: Tensor, weight_t: Tensor, target: Tensor) -> Tensor:
    """``1 - mean over images of cos(g_s, g_t)``, ``g = (softmax(z) - onehot(y)) W``.

    g is the gradient of an image's cross-entropy with respect to the input of the linear classifier with weights W.

    Args:
        logits_s: ``(B, K)``; gradient flows.
        weight_s: ``(K, D)`` of the student's classifier; gradient flows.
        logits_t: ``(B, K)``; gradient flows if they require one.
        weight_t: ``(K, D)``; gradient flows if it requires one.
        target: ``(B,)`` class numbers, or ``(B, K)`` shares.

    Returns:
        Scalar ``()`` from 0 to 2 in float32 or better.

    Raises:
        InputError: logits or weights of different shapes.

    Example:
        >>> z, w = torch.zeros(1, 2), torch.eye(2)
        >>> gradient_loss(z, w, z, -w, torch.tensor([0]))
        tensor(2.)
    """
    require_one_shape("gradient_loss", logits_s, logits_t)
    require_one_shape("gradient_loss", weight_s, weight_t)
    shares = F.one_hot(target, logits_s.shape[1]) if target.ndim == 1 else target
    with torch.autocast(logits_s.device.type, enabled=False):
        dtype = torch.promote_types(logits_s.dtype, torch.float32)
        gradients = (
            (logits.to(dtype).softmax(1) - shares) @ w.to(dtype)
            for logits, w in ((logits_s, weight_s), (logits_t, weight_t))
        )
        return 1 - F.cosine_similarity(*gradients, dim=1).mean()


class RelationMemory(ContrastMemory):
    """CRD's banks with the scores of relations. The rows have length 1 from the start."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for bank in (self.memory_v1, self.memory_v2):
            bank.copy_(F.normalize(bank, dim=1))

    def scores(self, embedding: Tensor, bank: Tensor, index: Tensor, contrastive_index: Tensor) -> Tensor:
        """Scores of all pairs of anchor and image, ``(B * B, K + 1)``, the positive first."""
        anchors, candidates = bank[index], bank[contrastive_index]
        own, others = relations(embedding, anchors), relations(candidates, anchors)
        return (others @ own[..., None]).squeeze(3).flatten(0, 1)


@register_distiller("CRCD", DEFAULTS, paper=PAPER, family="relation")
class CRCD(Distiller):
    """Contrast of relations with memory banks, gradients of the cross-entropy, and KD (:func:`gradient_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int) -> None:
        super().__init__(student, teacher)
        self.own, self.num_data = cfg.CRCD, num_data
        nce = self.own.NCE
        self.last_epoch = self.own.MIMIC_SHARE * cfg.SOLVER.EPOCHS
        facts = self.network_facts(cfg)
        width_s, width_t = (of_network.need("pooled_width") for of_network in facts)
        self.embed_s, self.embed_t = Embed(width_s, self.own.DIM), Embed(width_t, self.own.DIM)
        self.contrast = RelationMemory(self.own.DIM, num_data, nce.K, nce.TEMPERATURE, nce.MOMENTUM)
        self.gradient = self.own.GRADIENT
        if self.gradient != "off" and width_s != width_t:
            warn(f"CRCD: pooled features have {width_s} and {width_t} entries, so it goes without gradient element")
            self.gradient = "off"
        if self.gradient != "off":
            self.classifiers = [of_network.need("classifier") for of_network in facts]
            for network, name in zip((student, teacher), self.classifiers, strict=True):
                if not isinstance(network.get_submodule(name), nn.Linear):
                    raise InputError(f"CRCD: {name} is no linear classifier; set CRCD.GRADIENT off")

    def get_extra_parameters(self) -> int:
        """The number of elements of the projections and, as for CRD, of the banks."""
        return super().get_extra_parameters() + sum(buffer.numel() for buffer in self.contrast.buffers())

    def forward_train(
        self,
        image: Tensor,
        target: Tensor,
        index: Tensor,
        contrastive_index: Tensor,
        epoch: int = 1,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.own.LOSS
        logits_s, features_s = self.student(image)
        losses = {"loss_ce": weights.CE_WEIGHT * F.cross_entropy(logits_s, target)}
        if epoch > self.last_epoch:
            return logits_s, losses
        with torch.no_grad():
            logits_t, features_t = self.teacher(image)
        losses["loss_kd"] = weights.KD_WEIGHT * kd_loss(logits_s, logits_t, self.own.T)
        with torch.autocast(image.device.type, enabled=False):
            embed_s, embed_t = self.embed_s(features_s["pooled_feat"]), self.embed_t(features_t["pooled_feat"])
            ratios = self.contrast(embed_s, embed_t, index, contrastive_index)
            feat = sum(nce_loss(log_ratio, self.num_data) for log_ratio in ratios)
        losses["loss_feat"] = weights.FEAT_WEIGHT * feat
        if self.gradient != "off":
            w_s, w_t = (
                network.get_submodule(name).weight
                for network, name in zip((self.student, self.teacher), self.classifiers, strict=True)
            )
            gradient = weights.GRADIENT_WEIGHT * gradient_loss(logits_s, w_s, logits_t, w_t, target)
            losses["loss_gradient"] = gradient * losses["loss_kd"] if self.gradient == "product" else gradient
        return logits_s, losses
