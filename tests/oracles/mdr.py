"""MDR's relations, stage selection and losses, loop by loop, in float64.

From "MDR: Multi-stage Decoupled Relational Knowledge Distillation with Adaptive Stage Selection", ACM MM 2024,
Sec. 3.1-3.3. N anchors, M positives, D entries of a self-supervised module's output, K stages; arguments are nested
lists, ``anchor_of[i]`` is the anchor that positive i is made from. What the paper leaves open is settled as follows:

- the softmax of B runs over the anchors, so that a positive owns a distribution; over the positives on request;
- ranks are taken over the anchors of one positive, and count the strictly better entries; over the positives of one
  anchor on request. They come from the teacher;
- of stages that tie, the deepest is selected, or the shallowest on request; the losses of several stages are added;
- angle: tau^2 KL, mean over the positives; length: mean over all M N entries; on request both are the sums printed;
- mu is the mean over all M N pairs, of student and teacher by themselves, and the gradient passes through it, or not
  on request;
- a zero vector counts as one of length 1, so that its cosines are 0; where all lengths are equal, all differences are 0
  and have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .complex_step import absolute, kl_divergence, log_softmax, mean, norm, value

Vector = Sequence[Any]
Matrix = Sequence[Vector]
Stage = tuple[Matrix, Matrix]  # outputs of one stage: of the positives (M, D), of the anchors (N, D)


def self_supervised_module(maps: Any, *layers: tuple[Matrix, Vector]) -> list[list[Any]]:
    """Sec. 4.1: feature maps ``(B, C, H, W)``, pooled, then linear layers (weight, bias) with ReLU between them."""
    rows = []
    for image in maps:
        row = [mean([x for line in channel for x in line]) for channel in image]
        for number, (weight, bias) in enumerate(layers):
            if number:
                row = [x if value(x) > 0 else 0.0 for x in row]
            row = [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
        rows.append(row)
    return rows


def angle_matrix(z_pos: Matrix, z_anchor: Matrix) -> list[list[Any]]:
    """Eq. 4: ``(M, N)`` cosines."""

    def cosine(a: Vector, b: Vector) -> Any:
        length_a, length_b = (length if value(length := norm(v)) > 0 else 1.0 for v in (a, b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / (length_a * length_b)

    return [[cosine(positive, anchor) for anchor in z_anchor] for positive in z_pos]


def over_mean(matrix: Matrix, mu_gradient: bool = True) -> list[list[Any]]:
    """Every entry over the mean of all: mu of Eq. 10."""
    mu = mean([entry for row in matrix for entry in row])
    mu = mu if mu_gradient else value(mu)
    return [[entry / mu if value(mu) > 0 else 0.0 for entry in row] for row in matrix]


def length_matrix(z_pos: Matrix, z_anchor: Matrix, *, mu_gradient: bool = True) -> list[list[Any]]:
    """Eq. 9 and 10: ``(M, N)`` absolute differences of the lengths, over their mean."""
    return over_mean([[absolute(norm(p) - norm(a)) for a in z_anchor] for p in z_pos], mu_gradient)


def distance_matrix(z_pos: Matrix, z_anchor: Matrix, *, mu_gradient: bool = True) -> list[list[Any]]:
    """Eq. 6, for the ablation with distances: ``(M, N)``, over their mean."""
    distances = [[norm([x - y for x, y in zip(p, a, strict=True)]) for a in z_anchor] for p in z_pos]
    return over_mean(distances, mu_gradient)


def pair_ranks(matrix: Matrix, anchor_of: Sequence[int], *, descending: bool, dim: str = "anchor") -> list[int]:
    """Eq. 8, Rank: ``(M,)``, how many entries are strictly better than the one of a positive and its own anchor."""
    ranks = []
    for i, j in enumerate(anchor_of):
        if dim == "anchor":
            others = [matrix[i][k] for k in range(len(matrix[i]))]
        else:
            others = [matrix[k][j] for k in range(len(matrix))]
        own = value(matrix[i][j])
        rank = 0
        for other in others:
            if (value(other) > own) if descending else (value(other) < own):
                rank += 1
        ranks.append(rank)
    return ranks


def select_stages(ranks: Sequence[Sequence[int]], n: int = 1, ties: str = "deep") -> list[list[int]]:
    """Eq. 8, AS: ranks ``(K, M)`` -> ``(n, M)``, the stages of each positive from the best rank on."""
    selected = []
    for i in range(len(ranks[0])):
        left = list(range(len(ranks)))
        chosen = []
        for _ in range(n):
            best = left[0]
            for k in left[1:]:
                if ranks[k][i] < ranks[best][i] or (ties == "deep" and ranks[k][i] == ranks[best][i]):
                    best = k
            left.remove(best)
            chosen.append(best)
        selected.append(chosen)
    return [[chosen[r] for chosen in selected] for r in range(n)]


def selection(
    stages: Sequence[Stage],
    anchor_of: Sequence[int],
    kind: str,
    n: int,
    *,
    rank_dim: str = "anchor",
    ties: str = "deep",
) -> list[list[int]]:
    """``(n, M)``: the stages that a network's ``angle``, ``length`` or ``distance`` matrices select."""
    relation = {"angle": angle_matrix, "length": length_matrix, "distance": distance_matrix}[kind]
    ranks = [pair_ranks(relation(*stage), anchor_of, descending=kind == "angle", dim=rank_dim) for stage in stages]
    return select_stages(ranks, n, ties)


def log_relation(scores: Matrix, dim: str) -> list[list[Any]]:
    """log B of Eq. 7: ``(M, N)``, a log-softmax of every row (``anchor``) or of every column (``positive``)."""
    if dim == "anchor":
        return [log_softmax(row) for row in scores]
    columns = [log_softmax(column) for column in zip(*scores, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def every_stage(stages: int, positives: int) -> list[list[int]]:
    """``(K, M)``: no selection."""
    return [[k] * positives for k in range(stages)]


def relation_kl(
    student: Sequence[Matrix],
    teacher: Sequence[Matrix],
    selected: Sequence[Sequence[int]],
    *,
    tau: float = 0.5,
    relation_dim: str = "anchor",
    reduction: str = "mean",
) -> Any:
    """Eq. 12 of scores ``(K, M, N)``, the higher the nearer, over the stages ``selected``, ``(n, M)``."""
    log_s, log_t = (
        [log_relation([[x / tau for x in row] for row in matrix], relation_dim) for matrix in matrices]
        for matrices in (student, teacher)
    )
    loss = sum(kl_divergence(log_t[k][i], log_s[k][i]) for stages in selected for i, k in enumerate(stages))
    return tau**2 * loss / (len(selected[0]) if reduction == "mean" else 1)


def angle_loss(
    student: Sequence[Stage], teacher: Sequence[Stage], selected: Sequence[Sequence[int]], **options: Any
) -> Any:
    """Eq. 12; options of :func:`relation_kl`."""
    angles_s, angles_t = ([angle_matrix(*stage) for stage in stages] for stages in (student, teacher))
    return relation_kl(angles_s, angles_t, selected, **options)


def length_loss(
    student: Sequence[Stage],
    teacher: Sequence[Stage],
    selected: Sequence[Sequence[int]],
    *,
    reduction: str = "mean",
    mu_gradient: bool = True,
) -> Any:
    """Eq. 11 over the stages ``selected``, ``(n, M)``."""
    dif_s = [length_matrix(*stage, mu_gradient=mu_gradient) for stage in student]
    dif_t = [length_matrix(*stage) for stage in teacher]
    loss = 0.0
    for stages in selected:
        for i, k in enumerate(stages):
            for a, b in zip(dif_s[k][i], dif_t[k][i], strict=True):
                loss = loss + (a - b) * (a - b)
    return loss / (len(dif_t[0]) * len(dif_t[0][0]) if reduction == "mean" else 1)


def distance_loss(
    student: Sequence[Stage],
    teacher: Sequence[Stage],
    selected: Sequence[Sequence[int]],
    *,
    mu_gradient: bool = True,
    **options: Any,
) -> Any:
    """Eq. 7 with the distances of Eq. 6, for the ablation: near is likely. Options of :func:`relation_kl`."""
    near_s, near_t = (
        [[[-d for d in row] for row in distance_matrix(*stage, mu_gradient=mu_gradient)] for stage in stages]
        for stages in (student, teacher)
    )
    return relation_kl(near_s, near_t, selected, **options)


def contrastive_loss(z_pos: Matrix, z_anchor: Matrix, anchor_of: Sequence[int], tau: float) -> Any:
    """Eq. 5, for the ablation: mean over the positives of -log softmax of their own anchor."""
    rows = angle_matrix(z_pos, z_anchor)
    return mean([-log_softmax([c / tau for c in row])[j] for row, j in zip(rows, anchor_of, strict=True)])


def mixed_cross_entropy(logits: Matrix, labels: Matrix) -> Any:
    """Mean over anchors and positives of -sum of label log p; ``labels`` ``(M + N, C)`` are shares of the classes."""
    rows = zip(logits, labels, strict=True)
    return mean([-sum(y * x for y, x in zip(shares, log_softmax(row), strict=True)) for row, shares in rows])


def smp_accuracy(z_pos: Matrix, z_anchor: Matrix, anchor_of: Sequence[int]) -> float:
    """Sec. 4.3: the share of positives whose own anchor is the most similar one."""
    ranks = pair_ranks(angle_matrix(z_pos, z_anchor), anchor_of, descending=True)
    return mean([float(rank == 0) for rank in ranks])
