"""FKD: attention-guided and non-local distillation of the pyramid's maps.

For each of the four finest levels, with ``M`` the mean of both networks' attentions
(:func:`~mdistiller.functional.dense.fkd_attention`), constant:

- ``FEATURE_WEIGHT * sqrt(sum of M_spatial (conv(f_s) - f_t)^2)``;
- ``CHANNEL_WEIGHT * || linear(mean over positions of f_s) - mean over positions of f_t ||``;
- ``SPATIAL_WEIGHT * || conv(mean over channels of f_s) - mean over channels of f_t ||``;
- ``NONLOCAL_WEIGHT * || conv(n_s(f_s)) - n_t(f_t) ||`` with non-local maps n.

Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021. The authors' code is in a
supplement; this follows mmrazor's ``fbkd`` connectors: temperature 0.5, weights 7e-5, 4e-3, 4e-3, 7e-5, norms over the
whole batch, which therefore grow with its size. Public copies of the authors' code multiply all weights by 6 and also
use the channels' attention: ``FACTOR`` 6 and ``CHANNEL_MASK`` True. The teacher's non-local block is a module of the
method and is trained, as there. Both blocks start as the identity.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional.dense import fkd_attention, masked_distance
from mdistiller.options import Option, weight

from ._base import Aligned, register_dense
from .record import DetectorFacts, Record

DEFAULTS = {
    "FEATURE_WEIGHT": weight(7e-5, "of the masked maps"),
    "CHANNEL_WEIGHT": weight(4e-3, "of the means over positions"),
    "SPATIAL_WEIGHT": weight(4e-3, "of the means over channels"),
    "NONLOCAL_WEIGHT": weight(7e-5, "of the non-local maps"),
    "FACTOR": weight(1.0, "of all terms"),
    "TAU": Option(0.5, "temperature of the attention", above=0),
    "CHANNEL_MASK": Option(False, "the mask is the product of both attentions"),
    "LEVELS": Option(4, "number of the pyramid's levels, from the finest; 0: all", at_least=0, at_most=16),
}
PAPER = "Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021"


class NonLocal(nn.Module):
    """``x + W (sum over j of (theta(x_i) . phi(x_j)) g(x_j) / N)``; W starts at zero, so the module is the identity.

    Args:
        width: channels of the map.
        pool: keys and values are max-pooled by it.
        reduction: inner channels are ``width // reduction``.
    """

    def __init__(self, width: int, pool: int, reduction: int) -> None:
        super().__init__()
        inner = max(width // reduction, 1)
        self.pool = pool
        self.theta, self.phi, self.g = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        side = [min(self.pool, length) for length in x.shape[2:]]
        small = F.max_pool2d(x, side, side) if max(side) > 1 else x
        query, key, value = (f(y).flatten(2) for f, y in ((self.theta, x), (self.phi, small), (self.g, small)))
        mixed = value @ (key.mT @ query) / key.shape[2]  # (B, inner, H W)
        return x + self.out(mixed.view(len(x), -1, *x.shape[2:]))


@register_dense("FKD", DEFAULTS, paper=PAPER)
class FKD(Aligned):
    """Masked maps, their means over positions and over channels, and their non-local maps."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.tau, self.channel_mask = own.TAU, own.CHANNEL_MASK
        names = ("FEATURE_WEIGHT", "CHANNEL_WEIGHT", "SPATIAL_WEIGHT", "NONLOCAL_WEIGHT")
        self.weights = [own.FACTOR * own[name] for name in names]
        widths = list(zip(student.widths, teacher.widths, strict=True))[: len(self.align)]
        blocks = [(8, 4), (4, 4), (2, 2), (2, 2)]
        blocks += (len(widths) - len(blocks)) * [(1, 2)]
        self.channel = nn.ModuleList(nn.Linear(s, t) for s, t in widths)
        self.spatial = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in widths)
        self.relation = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in widths)
        self.nonlocal_s = nn.ModuleList(NonLocal(s, *block) for (s, _), block in zip(widths, blocks, strict=False))
        self.nonlocal_t = nn.ModuleList(NonLocal(t, *block) for (_, t), block in zip(widths, blocks, strict=False))

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        sums = [0.0] * 4
        for level, (aligned, f_t) in enumerate(self.pairs(student, teacher)):
            f_s = student.maps[level]
            spatial, channel = zip(*(fkd_attention(f, self.tau) for f in (f_s, f_t)), strict=True)
            mask = sum(spatial) / 2
            if self.channel_mask and f_s.shape[1] == f_t.shape[1]:
                mask = mask * sum(channel) / 2
            relation_t = self.nonlocal_t[level](f_t)
            relation_s = self.relation[level](self.nonlocal_s[level](f_s))
            terms = (
                masked_distance(aligned, f_t, mask),
                masked_distance(self.channel[level](f_s.mean((2, 3))), f_t.mean((2, 3))),
                masked_distance(self.spatial[level](f_s.mean(1, keepdim=True)), f_t.mean(1, keepdim=True)),
                (relation_s.float() - relation_t.float()).norm(),
            )
            sums = [total + term for total, term in zip(sums, terms, strict=True)]
        names = ("loss_feature", "loss_channel", "loss_spatial", "loss_nonlocal")
        return {name: w * total for name, w, total in zip(names, self.weights, sums, strict=True)}
