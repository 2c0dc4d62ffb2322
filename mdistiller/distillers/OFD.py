"""OFD: match the teacher's feature maps before the ReLU by a partial L2 distance with a margin.

Heo, Kim, Yun, Park, Kwak, Choi. A Comprehensive Overhaul of Feature Distillation. ICCV 2019. arXiv:1904.01866. Shapes:
B images, maps ``(B, C, H, W)``.

A 1x1 convolution and a batch norm transform the student's map. A margin ReLU ``max(x, m)`` transforms the teacher's.
The margin ``m < 0`` of a channel is the mean of its negative responses, computed from the batch norm before the ReLU
(:func:`margins`). The partial L2 distance (:func:`ofd_loss`) ignores positions where the teacher is negative and the
student is below the margin ReLU. A stage has half the weight of the next deeper one.

The teacher's batch norms use the statistics of the batch, as the student's do; the paper argues for this
(``TEACHER_BATCH_STATISTICS``). Departs from mdistiller: their running statistics do not change.

Maps: all but the first, the stem's in most networks. They are matched from the deep end; their number is the smallest
of both networks' numbers and the number of the teacher's batch norms. MobileNetV2 has no maps before an activation,
since its stages end without one; its maps are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape
from mdistiller.options import Option
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import batch_statistics, feature_losses, preact_maps

DEFAULTS = {
    "LOSS": feature_losses(0.001),
    "CONNECTOR": {
        "KERNEL_SIZE": Option(
            1,
            "kernel size of the convolutions on the student's maps",
            at_least=1,
            holds=(lambda size: size % 2 == 1, "odd"),
        )
    },
    "TEACHER_BATCH_STATISTICS": Option(True, "the teacher uses batch statistics; False: its running statistics"),
}
PAPER = "Heo et al., ICCV 2019, arXiv:1904.01866"

NEVER = 0.001  # a channel that is negative with at most this probability has the margin -3 deviations


def ofd_loss(f_s: Tensor, f_t: Tensor, margin: Tensor) -> Tensor:
    """``sum over C, H, W of c * (F_s - max(F_t, m))^2``, mean over the batch: the partial L2 distance.

    ``c`` is 0 where ``F_t <= 0`` and ``F_s <= max(F_t, m)``, else 1.

    Args:
        f_s: ``(B, C, H, W)``, the connector's output; gradient flows.
        f_t: ``(B, C, H, W)``, before the teacher's ReLU; constant.
        margin: m of each channel, ``(1, C, 1, 1)``, negative.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> f_s, f_t = torch.tensor([[[[1.0, -4.0]]]]), torch.tensor([[[[3.0, -2.0]]]])
        >>> ofd_loss(f_s, f_t, margin=torch.full((1, 1, 1, 1), -1.0))
        tensor(4.)
    """
    require_one_shape("ofd_loss", f_s, f_t)
    f_s, f_t = at_least_float32(f_s), at_least_float32(f_t.detach())
    wanted = torch.maximum(f_t, margin)
    counts = (f_s > wanted) | (f_t > 0)
    return ((f_s - wanted).square() * counts).sum() / len(f_s)


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """``E[x | x < 0]`` for ``x ~ N(bias, |weight|)``, channel by channel.

    Args:
        weight: ``(C,)`` of a batch norm; ``|weight|`` is the deviation of the batch norm's output.
        bias: ``(C,)`` of the batch norm, the mean of its output.

    Returns:
        ``(C,)``; ``-3 |weight|`` if the probability of ``x < 0`` is at most ``NEVER``.
    """
    dtype, weight, bias = weight.dtype, weight.double(), bias.double()
    deviation = weight.abs()
    share = torch.special.ndtr(-bias / deviation)
    density = torch.exp(-0.5 * (bias / deviation).square()) / math.sqrt(2 * math.pi)
    return torch.where(share > NEVER, bias - deviation * density / share, -3 * deviation).to(dtype)


def connector(student_channels: int, teacher_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution and batch norm from the student's width to the teacher's. The size of the map stays.

    He's initialisation by the outgoing connections, from torch's generator.

    Args:
        student_channels: width of the student's map.
        teacher_channels: width of the teacher's map.
        kernel_size: of the convolution, odd.
    """
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(teacher_channels))


class Connectors(nn.Module):
    """The connectors of all stages, shallow to deep, with mdistiller's names in the state dict.

    Args:
        student_channels: widths of the student's maps.
        teacher_channels: widths of the teacher's maps, the same number.
        kernel_size: of the convolutions, odd.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.connectors = nn.ModuleList(connector(s, t, kernel_size) for s, t in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [connect(f) for connect, f in zip(self.connectors, maps, strict=True)]


@register_distiller("OFD", DEFAULTS, paper=PAPER, family="feature")
class OFD(Distiller):
    """Partial L2 distance of feature maps before the ReLU, with a margin (:func:`ofd_loss`)."""

    mixed_labels = True
    reads_teacher_logits = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.ce_weight, self.feat_weight = cfg.OFD.LOSS.CE_WEIGHT, cfg.OFD.LOSS.FEAT_WEIGHT
        self.teacher_batch_statistics = cfg.OFD.TEACHER_BATCH_STATISTICS
        kernel_size = cfg.OFD.CONNECTOR.KERNEL_SIZE
        of_student, of_teacher = self.network_facts(cfg)
        norms = of_teacher.need("norms_before_relu")
        widths_s, widths_t = of_student.preact_channels[1:], of_teacher.preact_channels[1:]
        self.stages = min(len(norms), len(widths_s), len(widths_t))
        if not self.stages:
            raise InputError(
                f"OFD: the {of_student} and the {of_teacher} need at least two maps; choose other networks"
            )
        self.connectors = Connectors(widths_s[-self.stages :], widths_t[-self.stages :], kernel_size)
        # Margins depend on the teacher only: buffers move to the device, and are not saved.
        for i, name in enumerate(norms[-self.stages :]):
            norm = teacher.get_submodule(name)
            margin = margins(norm.weight.detach(), norm.bias.detach())[None, :, None, None]
            self.register_buffer(f"margin_{i}", margin, persistent=False)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad(), batch_statistics(self.teacher) if self.teacher_batch_statistics else nullcontext():
            _, features_teacher = self.teacher(image)
        maps_student = self.connectors(preact_maps(features_student)[-self.stages :])
        maps_teacher = preact_maps(features_teacher)[-self.stages :]
        total = 0.0
        for i, (f_s, f_t) in enumerate(zip(maps_student, maps_teacher, strict=True)):
            loss = ofd_loss(f_s, F.adaptive_avg_pool2d(f_t, f_s.shape[2:]), getattr(self, f"margin_{i}"))
            total = total + loss / 2 ** (self.stages - 1 - i)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_weight * total,
        }
