"""KDSVD's loss, by torch's decomposition and loops over entries, from arXiv:1807.06819, as mdistiller reads it.

A value alone: how the gradient passes through the decomposition is checked by differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .complex_step import dot


def directions(feat: Tensor, count: int) -> tuple[list[list[float]], list[float]]:
    """One map (C, H, W), read as C * H rows of W: its first right singular vectors and singular values."""
    _, values, vectors = torch.linalg.svd(feat.flatten(0, 1), full_matrices=False)
    return vectors[:count].tolist(), values[:count].tolist()


def turned(vector: list[float], negative: bool) -> list[float]:
    return [-x for x in vector] if negative else vector


def stage(f_s: Tensor, f_t: Tensor, k: int) -> tuple[list[list[float]], list[list[float]]]:
    """The k directions of each side, weighted by the teacher's singular values; the student's in the teacher's order.

    The teacher's have the sign that makes their sum positive, the student's the one that makes both alike.
    """
    (found, _), (of_teacher, values) = directions(f_s, k + 3), directions(f_t, k)
    of_teacher = [turned(v, sum(v) < 0) for v in of_teacher]
    nearest = [max(found, key=lambda u: abs(dot(u, v))) for v in of_teacher]
    of_student = [turned(u, dot(u, v) < 0) for u, v in zip(nearest, of_teacher, strict=True)]
    shares = [x / math.hypot(*values) for x in values]
    return tuple([[w * x for x in v] for w, v in zip(shares, side, strict=True)] for side in (of_student, of_teacher))


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int) -> float:
    """Of each stage maps (B, C, H, W): squared differences of the relations of stages that follow each other."""
    total = 0.0
    for image in range(len(g_s[0])):
        stages = [stage(f_s[image], f_t[image], k) for f_s, f_t in zip(g_s, g_t, strict=True)]
        for before, now in pairwise(stages):
            for n in range(k):
                relations = (
                    [math.exp(-((x - y) ** 2) / 8) for x in now[side][n] for y in before[side][n]] for side in (0, 1)
                )
                total += sum((a - b) ** 2 for a, b in zip(*relations, strict=True))
    return total / len(g_s[0])
