"""TaT: target-aware transformer, each teacher position is built from all student positions.

Lin, Xie, Wang, Yu, Chang, Liang, Wang. Knowledge Distillation via the Target-aware Transformer. CVPR 2022.
arXiv:2205.10793. Shapes: B images, C channels of the teacher's last map, P positions.

Two embeddings of the student's last map, a 3x3 convolution and a batch norm each, give queries q and values v of the
teacher's width; the teacher's map f gives the keys. ``w_ij = softmax over j of <q_i, f_j>`` and
``out_i = sum over j of w_ij v_j``, i and j positions. The loss is ``mean((out - f)^2)`` (:func:`tat_loss`). ``HEADS``
splits the channels.

As in the authors' code for ImageNet, whose map sizes agree; here the larger map is pooled. The paper's element-wise
equation normalises over the student's positions instead (``SOFTMAX_OVER``). The total is
``CE_WEIGHT CE + KD_WEIGHT KD + TAT_WEIGHT TaT``; the weights for CIFAR-100 are a reading (docs/readings.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_one_shape, same_size
from mdistiller.options import Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from .KD import kd_loss

POSITIONS = ("teacher", "student")
DEFAULTS = {
    "HEADS": Option(1, "parts of the channels with weights of their own", at_least=1, at_most=64),
    "SOFTMAX_OVER": Option("teacher", "positions over which the weights sum to 1; teacher: the authors' code",
                           one_of=POSITIONS),
    "T": Option(4.0, "temperature of KD", above=0),
    "LOSS": {
        "CE_WEIGHT": weight(0.1, "of the cross-entropy"),
        "KD_WEIGHT": weight(0.9, "of kd_loss"),
        "TAT_WEIGHT": weight(0.1, "of tat_loss; the paper: stable from 0.05 to 0.25"),
    },
}  # fmt: skip
PAPER = "Lin et al., CVPR 2022, arXiv:2205.10793"


def tat_loss(query: Tensor, value: Tensor, f_t: Tensor, heads: int = 1, over: str = "teacher") -> Tensor:
    """``mean((out - f)^2)``, ``out_i = sum over j of softmax_j(<q_i, f_j>) v_j`` (the products are not scaled).

    Args:
        query: ``(B, C, H, W)``, embedded from the student's map; gradient flows.
        value: ``(B, C, H, W)``; gradient flows.
        f_t: ``(B, C, H, W)``, the teacher's map; constant.
        heads: the channels are split into so many parts.
        over: positions j (``"teacher"``) or i (``"student"``) over which the weights sum to 1.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes; channels that ``heads`` does not divide.

    Example:
        >>> query, value, f_t = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1, 2)
        >>> tat_loss(query, value, f_t)
        tensor(4.)
    """
    require_one_shape("tat_loss", query, f_t)
    require_one_shape("tat_loss", value, f_t)
    images, channels, *_ = f_t.shape
    if channels % heads:
        raise InputError(f"TAT.HEADS {heads} does not divide the teacher's {channels} channels; set TAT.HEADS 1")
    with torch.autocast(f_t.device.type, enabled=False):
        query, value, key = (
            at_least_float32(x).reshape(images, heads, channels // heads, -1) for x in (query, value, f_t.detach())
        )
        weights = (query.mT @ key).softmax(3 if over == "teacher" else 2)  # (B, heads, positions of q, of f)
        return F.mse_loss(value @ weights.mT, key)


class Embedding(nn.Module):
    """3x3 convolution without bias, and a batch norm."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.conv(maps))


@register_distiller("TAT", DEFAULTS, paper=PAPER, family="feature")
class TaT(Distiller):
    """The teacher's last map from attention over the student's, and KD (:func:`tat_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg.TAT
        width_s, width_t = (facts.channels[-1] for facts in self.network_facts(cfg))
        self.query, self.value = Embedding(width_s, width_t), Embedding(width_s, width_t)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        f_s, f_t = same_size(features_student["feats"][-1], features_teacher["feats"][-1])
        f_s, losses = gradient_in_layout(f_s), self.own.LOSS
        query, value = (gradient_in_layout(embed(f_s)) for embed in (self.query, self.value))
        return logits_student, {
            "loss_ce": losses.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": losses.KD_WEIGHT * kd_loss(logits_student, logits_teacher, self.own.T),
            "loss_tat": losses.TAT_WEIGHT * tat_loss(query, value, f_t, self.own.HEADS, self.own.SOFTMAX_OVER),
        }
