"""AB: activation boundaries, start the student so that its neurons are active where the teacher's are.

Heo, Lee, Yun, Choi. Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons. AAAI 2019.
arXiv:1811.03233. Shapes: B images, maps ``(B, C, H, W)`` before the ReLU.

A connector (convolution and batch norm) takes the student's map of a stage to the teacher's shape; maps of one shape
have no connector. With the margin m, the loss of an element is ``(s + m)^2`` if the teacher is inactive (t <= 0) and
``s > -m``, and ``(s - m)^2`` if the teacher is active and ``s <= m``, else 0 (:func:`ab_loss`).

Two stages, as in the authors' code and RepDistiller: before training, this loss alone trains connectors and student
(``PREPARE``); then the cross-entropy alone. ``LOSS.FEAT_WEIGHT`` keeps the loss in training; published numbers have 0.

The student's classifier gets no gradient in the first stage. Maps without an activation (MobileNetV2) are taken as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_one_shape
from mdistiller.options import Option

from ._base import register_distiller
from ._common import STAGES, ConvReg, feature_losses, generator_kept, preact_maps, stage_pairs
from ._prepared import StartedByDistance, preparation_options

DEFAULTS = {
    "MARGIN": Option(1.0, "the margin m", at_least=0),
    "STAGES": STAGES,
    "PREPARE": preparation_options(epochs=30, lr=0.0),
    "LOSS": feature_losses(0.0),
}
PAPER = "Heo et al., AAAI 2019, arXiv:1811.03233"

SCALE = 3 / 1000  # of the authors' code


def single_stage_ab_loss(f_s: Tensor, f_t: Tensor, margin: float = 1.0) -> Tensor:
    """``3/1000 / B * sum of (s + m)^2 [t <= 0 and s > -m] + (s - m)^2 [t > 0 and s <= m]``.

    Args:
        f_s: ``(B, C, H, W)``, behind the connector; gradient flows.
        f_t: ``(B, C, H, W)``, before the teacher's ReLU; constant.
        margin: m.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> f_s, f_t = torch.tensor([[[[0.0, 0.0, 2.0]]]]), torch.tensor([[[[-1.0, 1.0, 1.0]]]])
        >>> single_stage_ab_loss(f_s, f_t)
        tensor(0.0060)
    """
    require_one_shape("ab_loss", f_s, f_t)
    f_s, active = at_least_float32(f_s), f_t > 0
    apart = torch.where(active, (margin - f_s).clamp(min=0), (f_s + margin).clamp(min=0))
    return SCALE * apart.square().sum() / len(f_s)


def ab_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], margin: float = 1.0) -> Tensor:
    """``sum over the n stages i of 2^(i - n) single_stage_ab_loss``, i from 1: the last stage has the weight 1.

    Args:
        g_s: the student's maps, shallow to deep; gradient flows.
        g_t: the teacher's maps of the same shapes; constant.
        margin: m.

    Returns:
        Scalar ``()``.

    Raises:
        InputError: maps of different shapes.
        ValueError: lists of different length.

    Example:
        >>> f_s, f_t = torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1.0, 1.0]]]])
        >>> ab_loss([f_s, f_s], [f_t, f_t])
        tensor(0.0090)
    """
    losses = [single_stage_ab_loss(f_s, f_t, margin) for f_s, f_t in zip(g_s, g_t, strict=True)]
    return sum(loss / 2**place for place, loss in enumerate(reversed(losses)))


@register_distiller("AB", DEFAULTS, paper=PAPER, family="feature")
class AB(StartedByDistance):
    """Activation boundaries of maps before the ReLU, before training (:func:`ab_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.margin = cfg.AB.MARGIN
        facts = self.network_facts(cfg)
        shapes_s, shapes_t = (of_network.preact_shapes or of_network.need("shapes") for of_network in facts)
        self.pairs = stage_pairs(*facts, cfg.AB.STAGES)
        with generator_kept():
            self.connectors = nn.ModuleList(
                nn.Identity() if shapes_s[i] == shapes_t[j] else ConvReg(shapes_s[i], shapes_t[j], use_relu=False)
                for i, j in self.pairs
            )

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps_s, maps_t = preact_maps(features_student), preact_maps(features_teacher)
        connected = [
            connect(gradient_in_layout(maps_s[i])) for connect, (i, _) in zip(self.connectors, self.pairs, strict=True)
        ]
        return ab_loss(connected, [maps_t[j] for _, j in self.pairs], self.margin)
