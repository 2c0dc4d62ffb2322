"""AT: attention transfer, match spatial attention maps.

Zagoruyko, Komodakis. Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer. ICLR 2017. arXiv:1612.03928. Shapes: B images, C channels, H, W positions.

The attention map of a stage is the mean over channels of ``|A|^p``, divided by its length. The loss is the squared
difference of student's and teacher's attention maps, summed over the stages.

Departs from the paper, as mdistiller does:

- the squared difference is a mean over images and positions. The paper takes the length of the difference (Eq. 2,
  weight beta / 2). The weight 1000 belongs to the mean;
- maps of different size are pooled to the smaller size first.

Departs from mdistiller (docs/differences.md): the choice of maps for networks with different numbers of maps
(``STAGES``), and absolute values for odd ``P``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, pool_to_common, unit
from mdistiller.options import Option

from ._base import register_distiller
from ._common import STAGES, FeatureDistiller, feature_losses, pick_pairs, stage_pairs

DEFAULTS = {
    "P": Option(2, "power of the activations in an attention map", at_least=1, at_most=64),
    "STAGES": STAGES,
    "LOSS": feature_losses(1000.0),
}
PAPER = "Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928"


def attention_map(feat: Tensor, p: int) -> Tensor:
    """``unit(mean_c |A_c|^p)``: one unit vector for each image (``F^p_sum`` of Sec. 3.1, up to a factor).

    Args:
        feat: ``(B, C, H, W)``; gradient flows.
        p: integer, at least 1. A larger p gives the strongest channels more weight.

    Returns:
        ``(B, H * W)`` in float32 or better, rows of length 1. A map of zeros stays zero.
    """
    feat = at_least_float32(feat)
    size = feat if p % 2 == 0 else torch.where(feat < 0, -feat, feat)
    return unit(size.pow(p).mean(1).flatten(1))


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: int) -> Tensor:
    """``mean((Q_s - Q_t)^2)`` over images and positions, Q the attention maps of one stage.

    Args:
        f_s: ``(B, C_s, H_s, W_s)``; gradient flows.
        f_t: ``(B, C_t, H_t, W_t)``; gradient flows if it requires one.
        p: power, see :func:`attention_map`.

    Returns:
        Scalar ``()``, from 0 to 2 / (H * W) of the smaller map.

    Raises:
        InputError: the maps have different numbers of images.

    Example:
        >>> f_s, f_t = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> single_stage_at_loss(f_s, f_t, p=2)
        tensor(1.)
    """
    f_s, f_t = pool_to_common(f_s, f_t)
    return (attention_map(f_s, p) - attention_map(f_t, p)).square().mean()


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: int) -> Tensor:
    """``sum over stages of mean((Q_s - Q_t)^2)``, Q the attention maps (Eq. 2; :func:`single_stage_at_loss`).

    Args:
        g_s: the student's maps, ``(B, C_s, H_s, W_s)`` each; gradient flows.
        g_t: the teacher's maps, the same number; gradient flows if they require one.
        p: power, see :func:`attention_map`.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: maps with different numbers of images.
        ValueError: lists of different length.

    Example:
        >>> maps = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)]
        >>> at_loss(maps, [3 * f for f in maps], p=2)
        tensor(0.)
    """
    return sum(single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=True))


@register_distiller("AT", DEFAULTS, paper=PAPER, family="feature")
class AT(FeatureDistiller):
    """Squared distance of spatial attention maps, stage by stage (:func:`at_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.p = cfg.AT.P
        self.pairs = stage_pairs(*self.network_facts(cfg), cfg.AT.STAGES)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps_s, maps_t = pick_pairs(features_student, features_teacher, self.pairs)
        return at_loss(maps_s, maps_t, self.p)
