"""CRD: contrastive representation distillation, an NCE loss with memory banks.

Tian, Krishnan, Isola. Contrastive Representation Distillation. ICLR 2020. arXiv:1910.10699. Shapes: N training images,
B images in a batch, D entries of an embedding, K negatives of an image.

A linear layer projects each network's pooled features to ``FEAT.DIM`` dimensions; the result is normalised. Two memory
banks, one for each network, hold an embedding of every training image. The loss contrasts an image's student embedding
with entries of the teacher's bank, and the teacher embedding with entries of the student's bank (Eq. 18;
:func:`nce_loss`). The positive is the image's own entry, the negatives are the entries of ``NCE.K`` images of other
classes. Then the banks are updated: half of the old entry plus half of the new embedding.

The density ratio is ``exp(similarity / TEMPERATURE) / Z``. As in the authors' code, Z is estimated from the first batch
and then constant, and both projections are trained.

Departs from mdistiller: the loss is computed from log-densities; several processes share Z and the new entries, so that
all have the same banks; the networks give the widths of the features. ``mdistiller/dataset/negatives.py`` explains
``MODE`` and draws the negatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32
from mdistiller.functional.gather import gather_rows
from mdistiller.options import MANY, WIDEST, Option, dead

from ._base import Distiller, register_distiller
from ._common import feature_losses

DEFAULTS = {
    "MODE": Option("exact", "the positive. exact: the image; relax: any image of its class", one_of=("exact", "relax")),
    "FEAT": {
        "DIM": Option(128, "entries of an embedding", at_least=1, at_most=WIDEST),
        "STUDENT_DIM": dead(256, "the student gives this width"),
        "TEACHER_DIM": dead(256, "the teacher gives this width"),
    },
    "LOSS": feature_losses(0.8),
    "NCE": {
        "K": Option(16384, "negatives of each image", at_least=1, at_most=MANY),
        "MOMENTUM": Option(0.5, "share of the old entry that a bank keeps", at_least=0, below=1),
        "TEMPERATURE": Option(0.07, "divides the similarities", above=0),
    },
}
PAPER = "Tian et al., ICLR 2020, arXiv:1910.10699"

EPS = 1e-7  # added to the noise's density, as in the authors' code
WHOLE_BANK = 16  # banks up to this many times the negatives: a product with the whole bank is cheaper than a selection


def nce_loss(log_ratio: Tensor, num_data: int) -> Tensor:
    """``-log(r_0 / (r_0 + c)) - sum_k log((K / N) / (r_k + c))``, mean over the batch (Eq. 18).

    This is noise-contrastive estimation: classify a pair as drawn from the data or from K times more noise. r is the
    density ratio, of the positive (0) and of the negatives (1 to K); ``c = K / N + 1e-7``. Plain form:
    tests/oracles/crd.py. The code uses logistic losses of ``log r - log c``.

    Args:
        log_ratio: ``(B, K + 1)`` log density ratios, the positive first, K at least 1; gradient flows.
        num_data: N, the number of images. The noise draws each with the same probability.

    Returns:
        Scalar ``()`` in float32 or better.

    Example:
        >>> nce_loss(torch.tensor([[2.0, -1.0, -1.0]]), num_data=2)
        tensor(0.7535)
    """
    log_ratio = at_least_float32(log_ratio)
    count = log_ratio.shape[1] - 1
    noise = count / num_data
    odds = log_ratio - math.log(noise + EPS)
    per_image = F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1) + count * math.log1p(EPS / noise)
    return per_image.mean()


def similarities(embedding: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """``embedding . bank[index]``: scalar products of each embedding with its rows of a bank.

    The bank may be updated afterwards. For a small bank the product with the whole bank is cheaper than a selection of
    ``B (K + 1)`` rows, since it reads the bank once.

    Args:
        embedding: ``(B, D)``; gradient flows.
        bank: ``(N, D)``; constant.
        index: ``(B, K + 1)`` rows of the bank.

    Returns:
        ``(B, K + 1)``.
    """
    if len(bank) <= WHOLE_BANK * index.shape[1]:
        return (embedding @ bank.clone().T).gather(1, index)
    return (bank[index] @ embedding[:, :, None]).squeeze(2)


class Embed(nn.Module):
    """Linear projection ``(B, width)`` to rows ``(B, dim)`` of length 1."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.linear(at_least_float32(pooled).flatten(1)), dim=1)


class ContrastMemory(nn.Module):
    """The banks of both networks, with mdistiller's names in the state dict.

    Args:
        dim: D.
        num_data: N.
        num_negatives: K.
        temperature: divides the similarities.
        momentum: share of the old entry in an update.
    """

    def __init__(self, dim: int, num_data: int, num_negatives: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        # mdistiller's layout: K, temperature, the student's Z, the teacher's Z, momentum. Z starts at -1.
        self.register_buffer("params", torch.tensor([num_negatives, temperature, -1.0, -1.0, momentum]))
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("memory_v1", torch.empty(num_data, dim).uniform_(-bound, bound))  # the student's
        self.register_buffer("memory_v2", torch.empty(num_data, dim).uniform_(-bound, bound))  # the teacher's

    def forward(self, embed_s: Tensor, embed_t: Tensor, index: Tensor, contrastive_index: Tensor) -> list[Tensor]:
        """Log density ratios of the student's and of the teacher's embeddings. The banks are updated afterwards.

        Args:
            embed_s: ``(B, D)``; gradient flows.
            embed_t: ``(B, D)``; gradient flows.
            index: ``(B,)`` positions of the images in the training set.
            contrastive_index: ``(B, K + 1)`` positions of the positive and the negatives, see :func:`nce_loss`.

        Returns:
            Two ``(B, K + 1)``, the shape of :meth:`scores`.
        """
        ratios = []
        for place, embedding, other in ((2, embed_s, self.memory_v2), (3, embed_t, self.memory_v1)):
            scores = self.scores(embedding, other, index, contrastive_index) / self.temperature
            ratios.append(scores - self._z(place, scores, len(embedding)).log())
        index = gather_rows(index)
        for memory, embedding in ((self.memory_v1, embed_s), (self.memory_v2, embed_t)):
            mixed = self.momentum * memory[index] + (1 - self.momentum) * gather_rows(embedding)
            memory.index_copy_(0, index, F.normalize(mixed, dim=1))
        return ratios

    def scores(self, embedding: Tensor, bank: Tensor, index: Tensor, contrastive_index: Tensor) -> Tensor:
        """Similarities ``(B, K + 1)`` of one network's embeddings and the other network's bank, the positive first."""
        return similarities(embedding, bank, contrastive_index)

    @torch.no_grad()
    def _z(self, place: int, scores: Tensor, images: int) -> Tensor:
        """The constant Z at ``place``. The first batch's scores set it, without a wait for the device."""
        z = gather_rows(scores.exp().mean(1).view(images, -1).mean(1)).mean() * len(self.memory_v1)
        self.params[place] = torch.where(self.params[place] < 0, z, self.params[place])
        return self.params[place].clone()


@register_distiller("CRD", DEFAULTS, paper=PAPER, family="feature")
class CRD(Distiller):
    """Contrastive loss with memory banks of both networks' embeddings (:func:`nce_loss`)."""

    mixed_labels = True
    reads_teacher_logits = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int) -> None:
        super().__init__(student, teacher)
        feat, nce = cfg.CRD.FEAT, cfg.CRD.NCE
        self.ce_weight, self.feat_weight = cfg.CRD.LOSS.CE_WEIGHT, cfg.CRD.LOSS.FEAT_WEIGHT
        self.num_data = num_data
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        self.embed_s, self.embed_t = Embed(width_s, feat.DIM), Embed(width_t, feat.DIM)
        self.contrast = ContrastMemory(feat.DIM, num_data, nce.K, nce.TEMPERATURE, nce.MOMENTUM)

    def get_extra_parameters(self) -> int:
        """The number of elements of the projections and, as in mdistiller, of the banks."""
        return super().get_extra_parameters() + sum(buffer.numel() for buffer in self.contrast.buffers())

    def forward_train(
        self, image: Tensor, target: Tensor, index: Tensor, contrastive_index: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        with torch.autocast(image.device.type, enabled=False):
            embed_s = self.embed_s(features_student["pooled_feat"])
            embed_t = self.embed_t(features_teacher["pooled_feat"])
            ratios = self.contrast(embed_s, embed_t, index, contrastive_index)
            loss = sum(nce_loss(log_ratio, self.num_data) for log_ratio in ratios)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_weight * loss,
        }
