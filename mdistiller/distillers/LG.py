"""LG: guide a vision transformer by the maps of a small convolutional network.

Li, Jie, Yu, Yang, Zheng et al. Locality Guidance for Improving Vision Transformers on Tiny Datasets. ECCV 2022.
arXiv:2207.10026. Shapes: B images, C channels of the teacher, H, W positions.

A 1x1 convolution with bias takes each of the student's maps to the teacher's width. Both maps are resized, bilinearly,
to the larger of their sizes. The loss is the mean squared difference, summed over the stages (:func:`lg_loss`).

The authors' teacher is ResNet-56 at 32 pixels, with three stages, and a transformer gives the maps of three blocks: for
DeiT-Ti those of blocks 0, 6 and 11 (``DISTILLER.STUDENT timm:...``, ``DISTILLER.STUDENT_MAPS``, and an input of 224
pixels by ``DISTILLER.STUDENT_INPUT``). Departs from the authors' code, which has its teacher in training mode: the
teacher is in eval mode. The transformer recipe of the papers' table is not a config here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_same_width

from ._base import register_distiller
from ._common import STAGES, FeatureDistiller, feature_losses, generator_kept, pick_pairs, stage_pairs

DEFAULTS = {"STAGES": STAGES, "LOSS": feature_losses(2.5)}
PAPER = "Li et al., ECCV 2022, arXiv:2207.10026"


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """``maps`` ``(B, C, H, W)`` at ``size``, bilinearly; unchanged if they have it."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def lg_loss(maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
    """``sum over stages of mean((F_s - F_t)^2)``, both maps at the larger of their sizes.

    Args:
        maps_s: ``(B, C, H, W)`` each, at the teacher's width; gradient flows.
        maps_t: ``(B, C, H', W')`` each, as many; constant.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different numbers of images or channels.
        ValueError: lists of different length.

    Example:
        >>> lg_loss([torch.ones(2, 3, 7, 7)], [torch.zeros(2, 3, 8, 8)])
        tensor(1.)
    """
    total = 0.0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        require_same_width("lg_loss", f_s, f_t)
        size = [max(pair) for pair in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
        total = total + F.mse_loss(*(resized(at_least_float32(f), size) for f in (f_s, f_t.detach())))
    return total


@register_distiller("LG", DEFAULTS, paper=PAPER, family="feature")
class LG(FeatureDistiller):
    """Maps of the stages behind a 1x1 convolution, at the larger size (:func:`lg_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        of_student, of_teacher = self.network_facts(cfg)
        self.pairs = stage_pairs(of_student, of_teacher, cfg.LG.STAGES)
        with generator_kept():
            self.transforms = nn.ModuleList(
                nn.Conv2d(of_student.channels[i], of_teacher.channels[j], 1) for i, j in self.pairs
            )

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps_s, maps_t = pick_pairs(features_student, features_teacher, self.pairs)
        transformed = [gradient_in_layout(layer(f)) for layer, f in zip(self.transforms, maps_s, strict=True)]
        return lg_loss(transformed, maps_t)
