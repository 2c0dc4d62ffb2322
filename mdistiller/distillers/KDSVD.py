"""KDSVD: match the relation between the main directions of consecutive stages.

Lee, Kim, Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
arXiv:1807.06819. Shapes: B images, C channels, H, W positions, k directions.

A map is a matrix of C * H rows and W columns. Its first right singular vectors ``v`` are its directions. By their
cosines, the student's directions are put in the teacher's order and sign. The teacher's singular values weight both
networks' directions. The relation of two consecutive stages is ``exp(-(v_i - v'_j)^2 / 8)`` of all entries, and the
loss is the squared difference of the networks' relations.

Departs from the paper, as mdistiller does: the paper's matrix has a row for each position and a column for each
channel. Departs from mdistiller (docs/differences.md):

- a decomposition leaves the sign of singular vectors open, and the loss depends on it. Here the sign is fixed
  (:func:`directions`);
- directions come from the eigenvectors of the W x W matrix ``X^T X`` in float64. Between equal singular values the
  gradient is infinite; such pairs are left out;
- the larger of two maps is pooled to the smaller size; mdistiller fails on such maps;
- the choice of maps for networks with different numbers of maps (``STAGES``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mdistiller.functional import at_least_float32, pool_to_common, unit
from mdistiller.options import Option
from mdistiller.registry import InputError

from ._base import register_distiller
from ._common import STAGES, FeatureDistiller, feature_losses, pick_pairs, stage_pairs

DEFAULTS = {
    "K": Option(1, "singular vectors of each stage", at_least=1),
    "STAGES": STAGES,
    "LOSS": feature_losses(1.0),
}
PAPER = "Lee et al., ECCV 2018, arXiv:1807.06819"

SPARE = 3  # the student has k + SPARE candidates for the teacher's k directions


class EigenVectors(torch.autograd.Function):
    """Eigenvectors of symmetric matrices ``(B, W, W)``, in columns, and eigenvalues, ascending.

    The gradient of ``torch.linalg.eigh`` divides by differences of eigenvalues. This one leaves out differences that
    float32 cannot tell from 0, relative to the largest eigenvalue: the two eigenvectors are any basis of their plane.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        ctx.mark_non_differentiable(values)
        return vectors, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gap = values[:, None, :] - values[:, :, None]
        equal = gap.abs() <= torch.finfo(torch.float32).eps * values[:, -1:, None].abs()
        inner = (vectors.mT @ grad) / gap.masked_fill(equal, torch.inf)
        outer = vectors @ inner @ vectors.mT
        return (outer + outer.mT) / 2


def directions(feat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of maps as ``(C * H, W)`` matrices, and the normalised singular values.

    Args:
        feat: ``(B, C, H, W)``; gradient flows through the vectors.
        k: number of vectors, at most W.

    Returns:
        ``(B, W, k)`` vectors in columns, each with a sum of at least 0, and ``(B, k)`` singular values as a vector of
        length 1. Both are in float32 or better. A map of zeros has singular values 0.
    """
    rows = at_least_float32(feat).flatten(1, 2)
    exact = rows.double()
    gram = exact.mT @ exact
    broken = ~gram.isfinite().all(2, keepdim=True).all(1, keepdim=True)  # eigh raises; NaN is wanted
    vectors, squares = EigenVectors.apply(gram.masked_fill(broken, 0))
    vectors, squares = vectors.masked_fill(broken, torch.nan).flip(2)[:, :, :k], squares.flip(1)[:, :k]
    sign = torch.where(vectors.detach().sum(1, keepdim=True) < 0, -1.0, 1.0)
    return (vectors * sign).to(rows.dtype), unit(squares.clamp(min=0).sqrt()).to(rows.dtype)


def aligned(v_s: Tensor, v_t: Tensor) -> Tensor:
    """The student's direction with the largest ``|cosine|`` to each of the teacher's, with the sign of that cosine.

    Args:
        v_s: ``(B, W, n)``; gradient flows.
        v_t: ``(B, W, k)``; constant.

    Returns:
        ``(B, W, k)``.
    """
    cosine = v_s.detach().mT @ v_t
    best = cosine.abs().argmax(1, keepdim=True)
    sign = cosine.gather(1, best).sign()
    return v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * sign


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int) -> Tensor:
    """``sum (R_s - R_t)^2`` over consecutive stages and all entries, mean over images; R is :func:`relation`.

    Plain form: tests/oracles/kdsvd.py.

    Args:
        g_s: the student's maps, ``(B, C_s, H_s, W_s)`` each; gradient flows.
        g_t: the teacher's maps, the same number; constant.
        k: number of directions of each stage.

    Returns:
        Scalar ``()``, 0 for equal maps.

    Raises:
        InputError: a map with fewer than ``k`` columns, or maps with different numbers of images.
        ValueError: lists of different length.

    Example:
        >>> maps = [torch.arange(start, start + 32.0).square().cos().view(1, 2, 4, 4) for start in (0, 32)]
        >>> kdsvd_loss(maps, maps, k=1), kdsvd_loss(maps, maps[::-1], k=1)
        (tensor(0.), tensor(0.0702))
    """
    stages = []
    with torch.autocast(g_s[0].device.type, enabled=False):
        for map_s, map_t in zip(g_s, g_t, strict=True):
            f_s, f_t = pool_to_common(map_s, map_t.detach())
            if k > f_s.shape[3]:
                raise InputError(f"KDSVD.K must be at most {f_s.shape[3]}, the width of the smallest map, got {k}")
            v_t, share = directions(f_t, k)
            v_s = aligned(directions(f_s, k + SPARE)[0], v_t)
            stages.append((v_s * share[:, None], v_t * share[:, None]))
        loss = g_s[0].new_zeros((), dtype=stages[0][0].dtype)
        for (s_before, t_before), (v_s, v_t) in pairwise(stages):
            loss = loss + (relation(v_s, s_before) - relation(v_t, t_before)).square().sum()
        return loss / len(g_s[0])


def relation(v: Tensor, before: Tensor) -> Tensor:
    """``exp(-(v_i - before_j)^2 / 8)`` for all pairs of entries.

    Args:
        v: ``(B, W, k)`` directions of a stage.
        before: ``(B, W', k)`` directions of the stage before.

    Returns:
        ``(B, W, W', k)``.
    """
    return torch.exp(-(v[:, :, None] - before[:, None]).square() / 8)


@register_distiller("KDSVD", DEFAULTS, paper=PAPER, family="feature")
class KDSVD(FeatureDistiller):
    """Correlation between singular vectors of successive stages' maps (:func:`kdsvd_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.k = cfg.KDSVD.K
        self.pairs = stage_pairs(*self.network_facts(cfg), cfg.KDSVD.STAGES)
        if len(self.pairs) < 2:
            raise InputError(
                f"KDSVD relates consecutive stages, but the {self.student_facts} and the {self.teacher_facts} have "
                f"{len(self.pairs)} in common; choose other networks"
            )

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        maps_s, maps_t = pick_pairs(features_student, features_teacher, self.pairs)
        return kdsvd_loss(maps_s, maps_t, self.k)
