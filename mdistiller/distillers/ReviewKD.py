"""ReviewKD: each stage of the teacher teaches the student's stages up to the same depth.

Chen, Liu, Zhao, Jia. Distilling Knowledge via Knowledge Review. CVPR 2021. arXiv:2104.09044. Shapes: B images, maps
``(B, C, H, W)``. A network's levels are its maps and, as the deepest level, the pooled features as a 1x1 map.

From the deepest level upwards, an attention-based fusion (:class:`ABF`) merges a student's level with the result of the
deeper levels and transforms it to the shape of the teacher's level. The hierarchical context loss (:func:`hcl_loss`)
compares the results with the teacher's maps before their activation, at full size and pooled to 4x4, 2x2 and 1x1.

Levels are matched from the deep end: all maps of the teacher but the first, and the same number of the student's. The
networks give widths and sizes.

Departs from the paper: where the text is silent, this follows the authors' code (the first map is left out, the
teacher's maps are taken before their activation, the weight rises over ``WARMUP_EPOCHS``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, channel_mean_square, require_one_shape
from mdistiller.options import MANY, WIDEST, Option, dead, weight

from ._base import Distiller, register_distiller
from ._common import preact_maps, warmup

DEFAULTS = {
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
    "REVIEWKD_WEIGHT": weight(1.0, "of hcl_loss"),
    "WARMUP_EPOCHS": Option(20, "epochs in which REVIEWKD_WEIGHT rises linearly", at_least=0, at_most=MANY),
    "SHAPES": dead([1, 8, 16, 32], "the student's maps give these sizes"),
    "OUT_SHAPES": dead([1, 8, 16, 32], "the teacher's maps give these sizes"),
    "IN_CHANNELS": dead([64, 128, 256, 256], "the student's maps give these widths"),
    "OUT_CHANNELS": dead([64, 128, 256, 256], "the teacher's maps give these widths"),
    "MAX_MID_CHANNEL": Option(512, "largest width of the fusions", at_least=1, at_most=WIDEST),
    "STU_PREACT": Option(False, "use the student's maps before the activation too"),
}
PAPER = "Chen et al., CVPR 2021, arXiv:2104.09044"

POOLED_SIDES = (4, 2, 1)


def hcl_loss(maps_student: Sequence[Tensor], maps_teacher: Sequence[Tensor]) -> Tensor:
    """``sum over levels of (sum_l w_l * MSE_l) / (sum_l w_l)``, ``w = 1, 1/2, 1/4, 1/8``: hierarchical context loss.

    The sizes l are the full size, 4x4, 2x2 and 1x1. A size that is not smaller than the map's height is left out. Plain
    form: tests/oracles/reviewkd.py.

    Args:
        maps_student: ``(B, C, H, W)`` for each level; gradient flows.
        maps_teacher: of the same shapes; constant.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.
        ValueError: lists of different length.

    Example:
        >>> maps_s, maps_t = [torch.ones(1, 2, 8, 8)], [torch.zeros(1, 2, 8, 8)]
        >>> hcl_loss(maps_s, maps_t), hcl_loss(2 * maps_s, 2 * maps_t)
        (tensor(1.), tensor(2.))
    """
    total = 0.0
    for f_s, f_t in zip(maps_student, maps_teacher, strict=True):
        require_one_shape("hcl_loss", f_s, f_t)
        pooled = difference = at_least_float32(f_s) - at_least_float32(f_t.detach())  # pooling is linear
        loss, weight, weights = channel_mean_square(difference).mean(), 1.0, 1.0
        # If 4 divides both sides, each smaller pooled map is the pooled larger one.
        nested = all(length % POOLED_SIDES[0] == 0 for length in difference.shape[2:])
        for side in POOLED_SIDES:
            if side < difference.shape[2]:
                weight /= 2
                weights += weight
                pooled = F.adaptive_avg_pool2d(pooled if nested else difference, side)
                loss = loss + weight * pooled.square().mean()
        total = total + loss / weights
    return total


class ABF(nn.Module):
    """Attention-based fusion: merge a student's map with the deeper level, then project it to the teacher's shape.

    Args:
        in_channels: width of the student's map.
        mid_channels: width of the fusion.
        out_channels: width of the teacher's map.
        fuse: whether there is a deeper level.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's, and the map for the next level.

        Args:
            x: ``(B, in_channels, H, W)``; gradient flows.
            deeper: ``(B, mid_channels, H', W')`` from the deeper level; ``None`` for the deepest level.
            size: of the teacher's map, ``(H_t, W_t)``.

        Returns:
            ``(B, out_channels, H_t, W_t)`` and ``(B, mid_channels, H_t, W_t)``.
        """
        x = self.conv1(x)
        if self.att_conv is not None:
            x = self._fuse(x, deeper)
        if x.shape[2:] != torch.Size(size):
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(x), x

    def _fuse(self, x: Tensor, deeper: Tensor) -> Tensor:
        """``x * a + up(deeper) * b``, with ``a, b = att_conv(cat(x, up(deeper)))``.

        A 1x1 convolution commutes with nearest upsampling. So the attention upsamples its two channels only, and the
        code does not store the concatenated map.
        """
        conv, squash = self.att_conv
        of_x, of_deeper = conv.weight.split([x.shape[1], deeper.shape[1]], dim=1)
        size = x.shape[2:]
        logits = F.conv2d(x, of_x, conv.bias) + F.interpolate(F.conv2d(deeper, of_deeper), size, mode="nearest")
        a, b = squash(logits).split(1, dim=1)
        return x * a + F.interpolate(deeper, size, mode="nearest") * b


@register_distiller("REVIEWKD", DEFAULTS, paper=PAPER, family="feature")
class ReviewKD(Distiller):
    """Knowledge review: fused stages, compared by a hierarchical context loss (:func:`hcl_loss`)."""

    mixed_labels = True
    reads_teacher_logits = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.REVIEWKD
        self.ce_weight, self.reviewkd_weight, self.warmup_epochs = own.CE_WEIGHT, own.REVIEWKD_WEIGHT, own.WARMUP_EPOCHS
        self.stu_preact = own.STU_PREACT
        of_student, of_teacher = self.network_facts(cfg)
        widths_s = of_student.preact_channels if self.stu_preact else of_student.channels
        widths_s = [*widths_s, of_student.need("pooled_width")]
        widths_t = [*of_teacher.preact_channels[1:], of_teacher.need("pooled_width")]
        self.levels = min(len(widths_s), len(widths_t))
        widths_s, widths_t = widths_s[-self.levels :], widths_t[-self.levels :]
        mid = min(own.MAX_MID_CHANNEL, widths_s[-1])
        deepest = self.levels - 1
        abfs = [ABF(s, mid, t, fuse=i < deepest) for i, (s, t) in enumerate(zip(widths_s, widths_t, strict=True))]
        self.abfs = nn.ModuleList(abfs[::-1])

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        maps_student = preact_maps(features_student) if self.stu_preact else features_student["feats"]
        levels_student = self._levels(maps_student, features_student)
        levels_teacher = self._levels(preact_maps(features_teacher), features_teacher)
        results, deeper = [], None
        for abf, level, like in zip(self.abfs, levels_student, levels_teacher, strict=True):
            result, deeper = abf(level, deeper, like.shape[2:])
            results.append(result)
        rise = warmup(epoch, self.warmup_epochs)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.reviewkd_weight * rise * hcl_loss(results, levels_teacher),
        }

    def _levels(self, maps: list[Tensor], features: dict[str, Any]) -> list[Tensor]:
        """Deepest first."""
        return [*maps, features["pooled_feat"][:, :, None, None]][: -self.levels - 1 : -1]
