"""SSKD: self-supervision as an auxiliary task, similarities of images and their rotated copies.

Xu, Liu, Li, Loy. Knowledge Distillation Meets Self-Supervision. ECCV 2020. arXiv:2006.07114. Shapes: B images, each
with its copies turned by 90, 180 and 270 degrees; K classes.

A head (linear, ReLU, linear) behind each network's pooled features gives embeddings. Row i of the similarities is the
softmax of the cosines of copy i with the B images. Before training, the teacher's head learns to find a copy's own
image (cross-entropy of the cosines; ``PREPARE``); the result is kept for other students. Then

- cross-entropy and KD on the images;
- TF: KD on the copies;
- SS: KL divergence of the similarities' rows at temperature ``SS_T``.

Copies that the teacher gets wrong are sorted by the rank of the right answer, and only a share of them counts
(``TF_RATIO``, ``SS_RATIO``; :func:`kept_rows`); the divergences are means over the rows that count.

Departs from the authors' code: ties of ranks keep the order of the batch; the images are flipped, if the data set's
view does so; the teachers are the usual ones, where the paper trains its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, draws, require_one_shape, require_same_images, unit
from mdistiller.functional.mixing import class_numbers
from mdistiller.functional.rotations import QUARTERS, rotations
from mdistiller.options import Option, weight

from ._base import Distiller, register_distiller
from ._common import generator_kept
from ._prepared import Batches, minimise, preparation_options
from .KD import kd_loss

DEFAULTS = {
    "T": Option(4.0, "temperature of KD on the images", above=0),
    "TF_T": Option(4.0, "temperature of KD on the copies", above=0),
    "SS_T": Option(0.5, "temperature of the similarities", above=0),
    "TF_RATIO": Option(1.0, "share of the copies with a wrong class that counts", at_least=0, at_most=1),
    "SS_RATIO": Option(0.75, "share of the copies with a wrong image that counts", at_least=0, at_most=1),
    "PREPARE": preparation_options(epochs=60, lr=0.05, decay_stages=(30, 45)),
    "LOSS": {
        "CE_WEIGHT": weight(0.1, "of the cross-entropy"),
        "KD_WEIGHT": weight(0.9, "of KD on the images"),
        "TF_WEIGHT": weight(2.7, "of KD on the copies"),
        "SS_WEIGHT": weight(10.0, "of the similarities"),
    },
}
PAPER = "Xu et al., ECCV 2020, arXiv:2006.07114"

HEAD_KEY = 5  # key of the seed for the initial weights of the teacher's head


def similarities(embeddings: Tensor) -> Tensor:
    """``(3 B, B)``: cosines of the copies with the images.

    Args:
        embeddings: ``(4 B, D)``, the images first; gradient flows.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = unit(at_least_float32(embeddings))
        images = len(directions) // QUARTERS
        return directions[images:] @ directions[:images].T


def own_image(similarity: Tensor) -> Tensor:
    """``(3 B,)``: the column of each copy's own image."""
    return torch.arange(len(similarity), device=similarity.device) % similarity.shape[1]


def contrastive_loss(similarity: Tensor) -> Tensor:
    """Cross-entropy of finding a copy's own image: ``-log softmax(cosines)[own]``, mean over the copies.

    Args:
        similarity: ``(3 B, B)`` cosines (:func:`similarities`); gradient flows. There is no temperature.

    Returns:
        Scalar ``()``.

    Example:
        >>> contrastive_loss(torch.zeros(6, 2))
        tensor(0.6931)
    """
    return F.cross_entropy(similarity, own_image(similarity))


def kept_rows(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """``(M,)`` bool: rows whose highest score is the target's, and the best ranked ``ratio`` of the others.

    Args:
        scores: ``(M, K)`` of the teacher.
        target: ``(M,)`` columns.
        ratio: share of the wrong rows, rounded down.
    """
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    right = (rank == 0).sum()
    count = right + ((len(rank) - right) * ratio).floor().long()
    place = rank.argsort(stable=True).argsort()
    return place < count


def kept_kl_loss(student: Tensor, teacher: Tensor, temperature: float, kept: Tensor) -> Tensor:
    """``T^2 KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the rows that count.

    Args:
        student: ``(M, K)`` scores; gradient flows.
        teacher: ``(M, K)`` scores; constant.
        temperature: T > 0.
        kept: ``(M,)`` bool.

    Returns:
        Scalar ``()`` in float32 or better; 0 if no row counts.

    Raises:
        InputError: scores of different shapes.

    Example:
        >>> student, teacher = torch.zeros(2, 2), torch.tensor([[4.0, 0.0], [9.0, 0.0]])
        >>> kept_kl_loss(student, teacher, 4.0, torch.tensor([True, False]))
        tensor(1.7751)
    """
    require_one_shape("kept_kl_loss", student, teacher)
    require_same_images("kept_kl_loss", student, kept)
    each = kd_loss(student, teacher.detach(), temperature, reduce=False)
    return (each * kept).sum() / kept.sum().clamp(min=1)


def head(width: int) -> nn.Sequential:
    """The projection of pooled features: linear, ReLU, linear, all of one width."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


@register_distiller("SSKD", DEFAULTS, paper=PAPER, family="relation")
class SSKD(Distiller):
    """KD on images and rotated copies, and similarities between both (:func:`kept_kl_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own, self.lr = cfg.SSKD, cfg.SOLVER.LR
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        self.student_head = head(width_s)
        with generator_kept(int(draws.hash_keys(cfg.EXPERIMENT.SEED, HEAD_KEY))):  # the same for each student
            self.teacher_head = head(width_t).requires_grad_(False)

    @property
    def student_images_per_sample(self) -> int:
        """Without weights of the copies there are none."""
        return QUARTERS if self.own.LOSS.TF_WEIGHT or self.own.LOSS.SS_WEIGHT else 1

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        own, weights, images = self.own, self.own.LOSS, len(image)
        shown = rotations(image) if self.student_images_per_sample > 1 else image
        logits_s, features_s = self.student(shown)
        with torch.no_grad():
            logits_t, features_t = self.teacher(shown)
        losses = {
            "loss_ce": weights.CE_WEIGHT * F.cross_entropy(logits_s[:images], target),
            "loss_kd": weights.KD_WEIGHT * kd_loss(logits_s[:images], logits_t[:images], own.T),
        }
        if self.student_images_per_sample > 1:
            copies_s, copies_t = logits_s[images:], logits_t[images:]
            kept = kept_rows(copies_t, class_numbers(target).repeat(QUARTERS - 1), own.TF_RATIO)
            losses["loss_tf"] = weights.TF_WEIGHT * kept_kl_loss(copies_s, copies_t, own.TF_T, kept)
            rows_s = self._similarities(self.student_head, features_s)
            rows_t = self._similarities(self.teacher_head, features_t)
            kept = kept_rows(rows_t, own_image(rows_t), own.SS_RATIO)
            losses["loss_ss"] = weights.SS_WEIGHT * kept_kl_loss(rows_s, rows_t, own.SS_T, kept)
        return logits_s[:images], losses

    def _similarities(self, project: nn.Module, features: dict[str, Any]) -> Tensor:
        pooled = features["pooled_feat"]
        with torch.autocast(pooled.device.type, enabled=False):
            return similarities(project(at_least_float32(pooled).flatten(1)))

    def prepare(self, batches: Batches, autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """Train the teacher's head to find a copy's own image."""

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad(), autocast():
                _, features = self.teacher(rotations(batch["image"]))
            return contrastive_loss(self._similarities(self.teacher_head, features))

        self.teacher_head.requires_grad_(True)
        try:
            return minimise(loss_of, self.teacher_head.parameters(), batches, self.own.PREPARE, self.lr)
        finally:
            self.teacher_head.requires_grad_(False)

    def preparation(self) -> tuple[nn.Module, dict[str, Any]]:
        """The teacher's head, and the settings on which it depends. It also depends on teacher, data and seed."""
        if self.student_images_per_sample == 1:
            return nn.Identity(), {}  # no term uses the head
        return self.teacher_head, {**self.own.PREPARE, "LR": self.own.PREPARE.LR or self.lr}
