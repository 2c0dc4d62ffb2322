"""ICKD: match the correlations between the channels of the last map.

Liu, Huang, Lin, Wen et al. Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation. ICCV
2021. arXiv:2202.03680. Shapes: B images, C channels of the teacher, H, W positions.

``G`` ``(C, C)`` of an image holds the scalar products of all pairs of channels, with rows normalised to length 1. The
loss is the squared difference of both networks' G (:func:`ickd_loss`). A 1x1 convolution and a batch norm take the
student's map to the teacher's width. The maps may have different sizes.

The authors' two codes divide the sum differently (``FORM``): ``cifar`` by ``C * B``, ``imagenet`` by ``C * B^2``, so
that the weight of ``imagenet`` means less in larger batches. The paper's rows "ICKD+KL" are ``DISTILLER.ADD_KD``. The
authors' code also makes a projection of the teacher's map that nothing uses; there is none here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_same_width, unit
from mdistiller.options import Option

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses, generator_kept

FORMS = ("cifar", "imagenet")
DEFAULTS = {
    "FORM": Option("cifar", "what divides the sum: cifar, C * B; imagenet, C * B^2", one_of=FORMS),
    "LOSS": feature_losses(2.5),
}
PAPER = "Liu et al., ICCV 2021, arXiv:2202.03680"


def channel_correlations(maps: Tensor) -> Tensor:
    """``unit(A A^T)``, A the rows of channels: scalar products of all pairs of channels, rows of length 1.

    Args:
        maps: ``(B, C, H, W)``; gradient flows.

    Returns:
        ``(B, C, C)`` in float32 or better. A channel of zeros has a row of zeros.
    """
    with torch.autocast(maps.device.type, enabled=False):
        channels = at_least_float32(maps).flatten(2)
        return unit(channels @ channels.mT)


def ickd_loss(f_s: Tensor, f_t: Tensor, form: str = "cifar") -> Tensor:
    """``sum((G_s - G_t)^2) / (C * B)``, or ``/ (C * B^2)``; G of :func:`channel_correlations`.

    Args:
        f_s: ``(B, C, H, W)``, the embedded map of the student; gradient flows.
        f_t: ``(B, C, H', W')``; constant.
        form: ``"cifar"`` or ``"imagenet"``, see the top of the file.

    Returns:
        Scalar ``()`` in float32 or better, from 0 to 4 for ``"cifar"``.

    Raises:
        InputError: maps of different numbers of images or of different widths.

    Example:
        >>> f_s, f_t = torch.ones(1, 2, 1, 2), torch.eye(2).view(1, 2, 1, 2)
        >>> ickd_loss(f_s, f_t)
        tensor(0.5858)
    """
    require_same_width("ickd_loss", f_s, f_t)
    images, channels = f_s.shape[:2]
    difference = channel_correlations(f_s) - channel_correlations(f_t.detach())
    return difference.square().sum() / (channels * images ** (2 if form == "imagenet" else 1))


@register_distiller("ICKD", DEFAULTS, paper=PAPER, family="relation")
class ICKD(FeatureDistiller):
    """Correlations between the channels of the last map (:func:`ickd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.form = cfg.ICKD.FORM
        width_s, width_t = (facts.channels[-1] for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed_s = nn.Sequential(nn.Conv2d(width_s, width_t, 1, bias=False), nn.BatchNorm2d(width_t))

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        embedded = gradient_in_layout(self.embed_s(features_student["feats"][-1]))
        return ickd_loss(embedded, features_teacher["feats"][-1], self.form)
