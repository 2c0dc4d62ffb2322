"""MGD: generate the teacher's last map from the student's, of which channels are masked.

Yang, Li, Shao, Shi, Yuan, Yuan. Masked Generative Distillation. ECCV 2022. arXiv:2205.01529. Shapes: B images, C
channels of the teacher, H, W positions.

A 1x1 convolution takes the student's map to C channels if the widths differ. Each channel of each image is set to 0
with probability ``MASK_RATIO``, anew in each step. Two 3x3 convolutions with a ReLU between them generate the teacher's
map. The loss is the squared difference, summed over channels and positions (:func:`mgd_loss`). So its size grows with
the map's, and the published weights, 7e-5 on ImageNet and 1.2e-3 on CIFAR-100, belong to their networks; for other
widths they are our reading.

Departs from the authors' code, which needs maps of equal sizes: the larger map is average-pooled, our reading. The
masks are functions of seed, epoch and image, so that a resumed run and several processes draw the same ones.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, draws, pool_to_common, require_one_shape
from mdistiller.options import Option

from ._base import Distiller, register_distiller
from ._common import feature_losses, generator_kept

DEFAULTS = {
    "MASK_RATIO": Option(0.15, "share of the channels that are masked", at_least=0, below=1),
    "LOSS": feature_losses(1.2e-3),
}
PAPER = "Yang et al., ECCV 2022, arXiv:2205.01529"
KEY = zlib.crc32(b"MGD's masks")


def mgd_loss(generated: Tensor, f_t: Tensor) -> Tensor:
    """``sum over C, H, W of (generated - F_t)^2``, mean over the batch.

    Args:
        generated: ``(B, C, H, W)``; gradient flows.
        f_t: ``(B, C, H, W)``; constant.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> mgd_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
        tensor(48.)
    """
    require_one_shape("mgd_loss", generated, f_t)
    return (at_least_float32(generated) - at_least_float32(f_t.detach())).square().sum() / len(generated)


def masked(maps: Tensor, draw: Tensor, ratio: float) -> Tensor:
    """``maps`` ``(B, C, H, W)`` with 0 in the channels whose ``draw`` ``(B, C)`` from [0, 1) is below ``ratio``."""
    return maps * (draw >= ratio).to(maps.dtype)[:, :, None, None]


@register_distiller("MGD", DEFAULTS, paper=PAPER, family="feature")
class MGD(Distiller):
    """Generation of the teacher's last map from a masked one of the student (:func:`mgd_loss`)."""

    mixed_labels = True
    reads_teacher_logits = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.ce_weight, self.feat_weight = cfg.MGD.LOSS.CE_WEIGHT, cfg.MGD.LOSS.FEAT_WEIGHT
        self.ratio, self.seed = cfg.MGD.MASK_RATIO, cfg.EXPERIMENT.SEED
        width_s, width_t = (facts.channels[-1] for facts in self.network_facts(cfg))
        with generator_kept():
            self.align = nn.Identity() if width_s == width_t else nn.Conv2d(width_s, width_t, 1)
            self.generation = nn.Sequential(
                nn.Conv2d(width_t, width_t, 3, padding=1), nn.ReLU(), nn.Conv2d(width_t, width_t, 3, padding=1)
            )

    def forward_train(
        self, image: Tensor, target: Tensor, index: Tensor | None = None, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        f_s, f_t = pool_to_common(self.align(features_student["feats"][-1]), features_teacher["feats"][-1])
        generated = self.generation(masked(f_s, self.draw(f_s, index, epoch), self.ratio))
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_weight * mgd_loss(generated, f_t),
        }

    def draw(self, maps: Tensor, index: Tensor | None, epoch: int) -> Tensor:
        """Uniform numbers ``(B, C)``. Without ``index``, positions in the batch replace it."""
        images, channels = (torch.arange(size, device=maps.device) for size in maps.shape[:2])
        return draws.uniform(self.seed, KEY, epoch, (images if index is None else index)[:, None], channels)
