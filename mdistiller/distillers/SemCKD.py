"""SemCKD: each stage of the student learns from all stages of the teacher, by learned attention.

Chen, Mei, Zhang, Wang, Feng, Chen. Cross-Layer Distillation with Semantic Calibration. AAAI 2021. arXiv:2012.03236.
Shapes: B images, S stages of the student, T stages of the teacher.

A stage is described for each image by its similarities to all images of the batch, scalar products of flattened maps.
Small networks of these descriptions give each stage's query (student) or key (teacher). The attention of a student's
stage is the softmax over the teacher's stages of ``query . key / SOFT``. A projection takes the student's map to the
width of each of the teacher's maps, at the smaller size. The loss is the mean squared difference of the projected and
the teacher's map, weighted by the attention (:func:`semckd_loss`). KD is added with ``LOSS.KD_WEIGHT``.

Stages are all maps but the first. The description has as many entries as ``SOLVER.BATCH_SIZE``. Departs from the
authors' code, which skips smaller batches and fails in several processes: images that a batch lacks have similarity 0.
``SOLVER.DROP_LAST`` leaves smaller batches out. The second regressor that the code makes for each query and key, and
that nothing uses, is not made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, pool_to_common, require_one_shape, unit
from mdistiller.options import Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import feature_losses, generator_kept
from .KD import kd_loss

DEFAULTS = {
    "SOFT": Option(1.0, "divides the products of queries and keys", above=0),
    "TEMPERATURE": Option(4.0, "temperature of KD", above=0),
    "LOSS": {**feature_losses(400.0), "KD_WEIGHT": weight(1.0, "of KD")},
}
PAPER = "Chen et al., AAAI 2021, arXiv:2012.03236"


def semckd_loss(attention: Tensor, distances: Tensor) -> Tensor:
    """``sum over stages of attention * distance``, mean over images and the student's stages.

    Args:
        attention: ``(B, S, T)``; gradient flows.
        distances: ``(B, S, T)`` mean squared differences of the maps; gradient flows.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: different shapes.

    Example:
        >>> semckd_loss(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[4.0, 0.0]]]))
        tensor(1.)
    """
    require_one_shape("semckd_loss", attention, distances)
    return (at_least_float32(attention) * at_least_float32(distances)).sum(2).mean()


def similarities(maps: Tensor, images: int) -> Tensor:
    """Scalar products of the flattened maps ``(B, ...)`` of all pairs, ``(B, images)``; 0 for images that B lacks.

    Raises:
        InputError: B is above ``images``.
    """
    if len(maps) > images:
        raise InputError(f"SEMCKD got a batch of {len(maps)} images, above SOLVER.BATCH_SIZE {images}")
    with torch.autocast(maps.device.type, enabled=False):
        rows = at_least_float32(maps).flatten(1)
        return F.pad(rows @ rows.T, (0, images - len(rows)))


class Description(nn.Module):
    """A stage's query or key ``(B, n // factor)`` of its similarities ``(B, n)``, of length 1."""

    def __init__(self, images: int, factor: int) -> None:
        super().__init__()
        width = max(images // factor, 1)
        self.linear1, self.linear2 = nn.Linear(images, 2 * width), nn.Linear(2 * width, width)

    def forward(self, similarities: Tensor) -> Tensor:
        return unit(self.linear2(F.relu(self.linear1(similarities))))


def projection(width_s: int, width_t: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolution without bias, the first two to twice the width, with batch norm and ReLU."""
    inner = 2 * width_t
    return nn.Sequential(
        nn.Conv2d(width_s, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, width_t, 1, bias=False),
    )  # fmt: skip


class Attention(nn.Module):
    """Queries, keys and projections of all pairs of stages.

    Args:
        images: entries of a description, the largest batch.
        widths_s: of the student's maps.
        widths_t: of the teacher's maps.
        soft: divides the products of queries and keys.
        factor: entries of a description over those of a query or key.
    """

    def __init__(self, images: int, widths_s: list[int], widths_t: list[int], soft: float, factor: int = 4) -> None:
        super().__init__()
        self.images, self.soft = images, soft
        self.query = nn.ModuleList(Description(images, factor) for _ in widths_s)
        self.key = nn.ModuleList(Description(images, factor) for _ in widths_t)
        self.project = nn.ModuleList(nn.ModuleList(projection(s, t) for t in widths_t) for s in widths_s)

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The attention and the distances, ``(B, S, T)`` each, of the networks' maps."""
        with torch.autocast(maps_s[0].device.type, enabled=False):
            query = torch.stack([q(similarities(f, self.images)) for q, f in zip(self.query, maps_s, strict=True)], 1)
            key = torch.stack([k(similarities(f, self.images)) for k, f in zip(self.key, maps_t, strict=True)], 2)
            attention = (query @ key / self.soft).softmax(2)
        return attention, torch.stack(
            [
                torch.stack([distance(project, f_s, f_t) for project, f_t in zip(projects, maps_t, strict=True)], 1)
                for projects, f_s in zip(self.project, maps_s, strict=True)
            ],
            1,
        )


def distance(project: nn.Module, f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference ``(B,)`` of the projected and the teacher's map, at the smaller size."""
    f_s, f_t = pool_to_common(f_s, f_t)
    return (at_least_float32(gradient_in_layout(project(f_s))) - f_t).square().mean((1, 2, 3))


@register_distiller("SEMCKD", DEFAULTS, paper=PAPER, family="feature")
class SemCKD(Distiller):
    """Distances of all pairs of stages, weighted by attention (:func:`semckd_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.SEMCKD
        self.weights, self.temperature = own.LOSS, own.TEMPERATURE
        widths_s, widths_t = (facts.channels[1:] for facts in self.network_facts(cfg))
        with generator_kept():
            self.attention = Attention(cfg.SOLVER.BATCH_SIZE, widths_s, widths_t, own.SOFT)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        maps = [gradient_in_layout(f) for f in features_student["feats"][1:]]
        distance = semckd_loss(*self.attention(maps, features_teacher["feats"][1:]))
        return logits_student, {
            "loss_ce": self.weights.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": self.weights.KD_WEIGHT * kd_loss(logits_student, logits_teacher, self.temperature),
            "loss_feat": self.weights.FEAT_WEIGHT * distance,
        }
