"""VRM's two losses with every edge written out, in float64; differentiable, slow and large.

From arXiv:2502.20760, Sec. 3.3-3.6, and Algorithm 1 of the supplement. Shapes: B batch, C classes, N vertices of D
entries. The inter-sample graph has the B predictions as vertices (N = B, D = C), the inter-class graph the C columns of
the prediction matrix (N = C, D = B). An edge leads from a vertex of the real view to one of the virtual view.
What the paper leaves open is settled here as in the library:

- uncertainty: ``cross`` -sum p log q, ``mixture`` the entropy of (p + q) / 2, ``sum`` both entropies added;
- the inter-class uncertainty is that of columns which sum to 1 over the batch;
- the percentile runs over all edges of the graph, and an edge that lies on it is kept;
- an edge much shorter than its graph's mean, in either network, is dropped too;
- an edge of length exactly 0 that is kept all the same (``edge_eps`` 0) is a zero vector without gradient;
- ``cosine`` is (1 - cosine) of an edge, divided by D under ``element``: half of ``mse`` in every reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """``(..., C)`` -> ``(...)``, in nats; 0 log 0 is 0."""
    return -torch.xlogy(p, p).sum(dim=-1)


def edge_uncertainty(p_real: Tensor, p_virtual: Tensor, kind: str) -> Tensor:
    """Uncertainty of each pair (Eq. 2): ``(B, C)`` twice -> ``(B, B)``, [i, j] that of p_real[i], p_virtual[j]."""
    p, q = p_real.double()[:, None, :], p_virtual.double()[None, :, :]
    if kind == "cross":
        return -torch.xlogy(p, q).sum(dim=-1)
    if kind == "mixture":
        return entropy((p + q) / 2)
    if kind == "sum":
        return entropy(p) + entropy(q)  # (B, 1) + (1, B)
    raise ValueError(kind)


def differences(real: Tensor, virtual: Tensor) -> Tensor:
    """``(N, D)`` twice -> ``(N, N, D)``: real[i] - virtual[j]."""
    return real.double()[:, None, :] - virtual.double()[None, :, :]


def lengths(difference: Tensor) -> Tensor:
    """``(..., D)`` -> ``(...)``, constants."""
    return difference.detach().square().sum(dim=-1).sqrt()


def normalise(vectors: Tensor) -> Tensor:
    """Eq. 1, for edges: ``(..., D)`` over its lengths; a zero vector stays one and passes no gradient."""
    zero = lengths(vectors)[..., None] == 0
    vectors = vectors.masked_fill(zero, 0.0)
    squared = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / squared.masked_fill(zero, 1.0).sqrt()


def percentile_mask(uncertainty: Tensor, percentile: float) -> Tensor:
    """``(N, N)`` bool: the edges that Eq. 2 keeps."""
    uncertainty = uncertainty.detach()
    return uncertainty <= torch.quantile(uncertainty.flatten(), percentile / 100)


def length_mask(difference: Tensor, edge_eps: float) -> Tensor:
    """``(N, N)`` bool: the edges that are long enough to have a direction."""
    length = lengths(difference)
    return length >= edge_eps * length.mean()


def entry_losses(edges_s: Tensor, edges_t: Tensor, metric: str, huber_delta: float) -> Tensor:
    """phi of each entry, ``(..., D)``; summed over D it is phi of the edge."""
    if metric == "mse":
        return (edges_s - edges_t).square()
    if metric == "l1":
        return (edges_s - edges_t).abs()
    if metric == "huber":
        return F.huber_loss(edges_s, edges_t, reduction="none", delta=huber_delta)
    if metric == "cosine":
        return 1 / edges_s.shape[-1] - edges_s * edges_t
    raise ValueError(metric)


def reduce_kept(entries: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """``(..., D)`` entries of the edges ``kept``, ``(...)`` -> scalar; 0 where no edge is kept."""
    total = entries[kept].sum()
    number = max(int(kept.sum()), 1)
    if reduction == "sum":
        return total
    if reduction == "edge":
        return total / number
    if reduction == "element":
        return total / (number * entries.shape[-1])
    raise ValueError(reduction)


def graph_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    beliefs: Sequence[Tensor],
    *,
    prune_percentile: float = 95.0,
    metric: str = "mse",
    reduction: str = "element",
    uncertainty: str = "cross",
    edge_eps: float = 1e-3,
    huber_delta: float = 1.0,
    relation: str = "difference",
    edge_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss of one graph, and the share of its edges that are kept.

    Vertices are ``(N, D)`` of the real and of the virtual view; ``beliefs`` are what the uncertainty is of.
    Relations of the ablations: ``gram``, inner products or cosines, ``(N, N)``; ``angle``, cosines between two edges
    that leave one vertex, ``(N, N, N)``.
    """
    student, teacher = [x.double() for x in student], [x.detach().double() for x in teacher]
    difference_s, difference_t = differences(*student), differences(*teacher)
    kept = percentile_mask(edge_uncertainty(*beliefs, uncertainty), prune_percentile)
    if relation != "gram" and edge_norm:
        kept = kept & length_mask(difference_s, edge_eps) & length_mask(difference_t, edge_eps)
    relations = [difference_s, difference_t]
    if relation == "gram":
        views = [[normalise(x) if edge_norm else x for x in side] for side in (student, teacher)]
        relations = [(real @ virtual.T)[..., None] for real, virtual in views]
    elif edge_norm:
        relations = [normalise(difference) for difference in relations]
    used = kept
    if relation == "angle":
        relations = [torch.einsum("ijd,ikd->ijk", edges, edges)[..., None] for edges in relations]
        used = kept[:, :, None] & kept[:, None]
    entries = entry_losses(*relations, metric, huber_delta)
    return reduce_kept(entries, used, reduction), kept.double().mean()


def vrm_loss(
    p_real_s: Tensor, p_virtual_s: Tensor, p_real_t: Tensor, p_virtual_t: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The unweighted inter-sample and inter-class losses, two float64 scalars; options of :func:`graph_loss`.

    All four inputs are class probabilities ``(B, C)``; gradient flows to the student's two (``_s``).
    """
    student, teacher = (p_real_s, p_virtual_s), (p_real_t, p_virtual_t)
    columns_s, columns_t = ([p.T for p in views] for views in (student, teacher))
    isv, _ = graph_loss(student, teacher, student, **options)
    icv, _ = graph_loss(columns_s, columns_t, [sum_to_one(p.double()) for p in columns_s], **options)
    return isv, icv


def sum_to_one(columns: Tensor) -> Tensor:
    """``(C, B)``: each class's share of the images, what its uncertainty is taken of."""
    return columns / columns.sum(dim=-1, keepdim=True)
