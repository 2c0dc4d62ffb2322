"""FitNet: regress the teacher's feature map from the student's.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio. FitNets: Hints for Thin Deep Nets. ICLR 2015. arXiv:1412.6550.
Shapes: B images, C channels, H, W positions.

A regressor (:class:`~mdistiller.distillers._common.ConvReg`: convolution, batch norm, ReLU) maps a feature map of the
student to the shape of the teacher's map, the hint. The loss is their squared difference (Eq. 3).

Departs from the paper, as mdistiller does: one training stage with hint and labels, not two; the loss is a mean over
all elements; the regressor ends in batch norm and ReLU.

Departs from mdistiller (docs/differences.md): ``MULTI_STAGE`` gives every stage a hint and a regressor and sums the
losses; new regressors leave the networks' state unchanged; for networks with different numbers of maps, ``HINT_LAYER``
counts the teacher's maps (``STAGES``).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_same_images
from mdistiller.options import Option, dead
from mdistiller.registry import InputError

from ._base import register_distiller
from ._common import (
    STAGES,
    ConvReg,
    FeatureDistiller,
    feature_losses,
    generator_kept,
    pick_pairs,
    stage_offset,
    stage_pairs,
)

DEFAULTS = {
    "HINT_LAYER": Option(2, "index of the teacher's map, from 0; without MULTI_STAGE", at_least=0),
    "MULTI_STAGE": Option(False, "a hint in every stage"),
    "STAGES": STAGES,
    "INPUT_SIZE": dead((32, 32), "DATASET.IMAGE_SIZE says it"),
    "LOSS": feature_losses(100.0),
}
PAPER = "Romero et al., ICLR 2015, arXiv:1412.6550"


def hint_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """``mean((r(F_s) - F_t)^2)`` over all elements (Eq. 3 without its factor 1/2).

    Args:
        f_s: ``(B, C, H, W)``, the regressor's output; gradient flows.
        f_t: ``(B, C, H, W)``; gradient flows if it requires one.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes. Images of another size than ``DATASET.IMAGE_SIZE`` cause this.

    Example:
        >>> hint_loss(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
        tensor(1.)
    """
    require_same_images("hint_loss", f_s, f_t)
    if f_s.shape != f_t.shape:
        raise InputError(
            f"the regressed map is {'x'.join(map(str, f_s.shape[1:]))}, the teacher's "
            f"{'x'.join(map(str, f_t.shape[1:]))}; DATASET.IMAGE_SIZE must be the side of the images"
        )
    return F.mse_loss(at_least_float32(f_s), at_least_float32(f_t))


@register_distiller("FITNET", DEFAULTS, paper=PAPER, family="feature")
class FitNet(FeatureDistiller):
    """Mean squared error of hint maps behind a regressor (:func:`hint_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        own = cfg.FITNET
        facts = self.network_facts(cfg)
        shapes_s, shapes_t = (of_network.need("shapes") for of_network in facts)
        if own.MULTI_STAGE:
            self.pairs = stage_pairs(*facts, own.STAGES)
        else:
            offset = stage_offset(*facts, own.STAGES)
            self.pairs = [single_pair(own.HINT_LAYER, len(shapes_s), len(shapes_t), offset)]
        with generator_kept():
            regressors = [ConvReg(shapes_s[i], shapes_t[j]) for i, j in self.pairs]
        self.conv_reg = nn.ModuleList(regressors) if own.MULTI_STAGE else regressors[0]  # mdistiller's key for one

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        regressors = self.conv_reg if isinstance(self.conv_reg, nn.ModuleList) else [self.conv_reg]
        maps = zip(regressors, *pick_pairs(features_student, features_teacher, self.pairs), strict=True)
        return sum(hint_loss(regressor(f_s), f_t) for regressor, f_s, f_t in maps)


def single_pair(layer: int, num_s: int, num_t: int, offset: int) -> tuple[int, int]:
    """Numbers of the student's and of the teacher's map for ``HINT_LAYER``.

    Args:
        layer: ``HINT_LAYER``.
        num_s: number of the student's maps.
        num_t: number of the teacher's maps.
        offset: see :func:`~mdistiller.distillers._common.stage_offset`.

    Raises:
        InputError: there is no such pair.
    """
    allowed = [j for j in range(num_t) if 0 <= j + offset < num_s]
    if layer not in allowed:
        raise InputError(
            f"FITNET.HINT_LAYER must be from {allowed[0]} to {allowed[-1]}, got {layer}: the student has {num_s} maps "
            f"and the teacher {num_t}"
        )
    return layer + offset, layer
