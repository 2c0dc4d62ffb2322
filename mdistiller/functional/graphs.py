"""Relation graphs between the vertices of two views, and the distance of a student's graph to its teacher's.

A graph has N vertices x of a real view and N vertices y of a virtual view. A vertex has D entries. An edge joins every
x to every y. The value of an edge is its *relation* (:class:`Rules`): the unit difference
``(x_i - y_j) / ||x_i - y_j||``, an inner product, or the angles between edges. With ``y = x`` the graph lies within one
view: every edge occurs twice, and the edges on the diagonal have length zero.

The code avoids ``[N, N, D]`` tensors of differences. For unit vectors ``||e_s - e_t||^2 = 2 - 2 <e_s, e_t>``. Both
``<x_s - y_s, x_t - y_t>`` and the lengths expand into products of matrices, and so does the gradient. L1, Huber with a
small delta, and angles do not expand; the code computes them in chunks of bounded size.

Plain form: tests/oracles/vrm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.registry import InputError, check_choice

from .precision import at_least_float32

RELATIONS = ("difference", "gram", "angle")
METRICS = ("mse", "l1", "huber", "cosine")
REDUCTIONS = ("element", "edge", "sum")
UNCERTAINTIES = ("cross", "mixture", "sum")

CHUNK = 2**19  # entries of a temporary tensor: 4 MB in float64
# The expanded |x - y|^2 loses digits of short edges. If its value is below this share of |x|^2 + |y|^2, and short edges
# are kept, the length is computed from the difference.
NEAR = {torch.float64: 1e-6, torch.float32: 1e-2}
ZERO = {torch.float64: 1e-150, torch.float32: 1e-18}  # replaces a length of zero; its inverse square is finite


@dataclass(frozen=True)
class Rules:
    """How two graphs are compared. Error messages begin with an option's name in upper case.

    Args:
        prune_percentile: in [0, 100]. Edges whose uncertainty lies above this percentile of their graph are dropped.
            100 drops no edge, 0 keeps the most certain edge.
        metric: distance of student's and teacher's relation, entry by entry. ``"mse"``: squared difference; ``"l1"``;
            ``"huber"``; ``"cosine"``: half the squared difference, whose sum over a unit edge is 1 - cosine.
        reduction: ``"element"``: mean over the entries of the kept relations; ``"edge"``: sum over a relation's
            entries, mean over the kept relations; ``"sum"``: sum over all entries of the kept relations.
        uncertainty: see :func:`edge_uncertainty`.
        edge_eps: an edge is also dropped if, in either network, its length is below ``edge_eps`` times the mean length
            of its graph. 0 drops no edge. An edge of length zero is then a zero vector without gradient.
        huber_delta: Huber's loss is half the square below this difference and linear above.
        relation: ``"difference"``: D entries; ``"gram"``: one entry, the inner product of the vertices; ``"angle"``:
            the cosine of the angle at a real vertex between two of its edges, for all pairs of kept edges.
        edge_norm: differences have unit length; inner products are those of unit vectors (cosines). ``edge_eps`` drops
            no edge if ``edge_norm`` is off or the relation is an inner product.

    Raises:
        InputError: an unknown name, a value out of range, or options that contradict each other.
    """

    prune_percentile: float = 95.0
    metric: str = "mse"
    reduction: str = "element"
    uncertainty: str = "cross"
    edge_eps: float = 1e-3
    huber_delta: float = 1.0
    relation: str = "difference"
    edge_norm: bool = True

    def __post_init__(self) -> None:
        named = {"metric": METRICS, "reduction": REDUCTIONS, "uncertainty": UNCERTAINTIES, "relation": RELATIONS}
        for name, allowed in named.items():
            check_choice(name.upper(), getattr(self, name), allowed)
        if not 0 <= self.prune_percentile <= 100:
            raise InputError(f"PRUNE_PERCENTILE must be from 0 to 100, got {self.prune_percentile}")
        if not 0 <= self.edge_eps < float("inf"):
            raise InputError(f"EDGE_EPS must be 0 or more, got {self.edge_eps}")
        if not self.huber_delta > 0:
            raise InputError(f"HUBER_DELTA must be above 0, got {self.huber_delta}")
        if self.metric == "cosine" and (self.relation != "difference" or not self.edge_norm):
            raise InputError(
                "METRIC cosine compares unit edges, so it needs RELATION difference and EDGE_NORM True, got "
                f"{self.relation} and {self.edge_norm}; choose mse, l1 or huber"
            )
        if self.relation == "angle" and not self.edge_norm:
            raise InputError("RELATION angle is between unit edges, so EDGE_NORM must be True, got False")

    @property
    def squared_factor(self) -> float | None:
        """The factor c if the metric of two unit edges is ``c * (squared difference)``, else ``None``.

        Entries of unit edges differ by at most 2. So Huber's loss is quadratic if its delta is 2 or more.
        """
        if self.metric == "mse":
            return 1.0
        if self.metric == "cosine" or (self.metric == "huber" and self.huber_delta >= 2):
            return 0.5
        return None

    def of_entries(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The metric, entry by entry."""
        if self.metric == "l1":
            return (student - teacher).abs()
        if self.metric == "huber":
            return F.huber_loss(student, teacher, reduction="none", delta=self.huber_delta)
        return self.squared_factor * (student - teacher).square()

    def scale(self, relations: Tensor, entries: int) -> float | Tensor:
        """The divisor of the sum over all entries.

        Args:
            relations: number of kept relations, ``()``.
            entries: number of entries of a relation.
        """
        return (
            1.0 if self.reduction == "sum" else relations.clamp_min(1) * (entries if self.reduction == "element" else 1)
        )


class Comparison(NamedTuple):
    """The loss ``()`` and two facts without gradient: the share of kept edges, and the mean uncertainty in nats."""

    loss: Tensor
    kept: Tensor
    uncertainty: Tensor


def compare_graphs(student: Tensor, teacher: Tensor, beliefs: Tensor, rules: Rules) -> Comparison:
    """The distance of the student's graph to the teacher's.

    All computations are in float64; devices without float64 (MPS) use float32.

    Cost of inner products, and of differences under ``mse``, ``cosine`` or ``huber`` with ``huber_delta`` 2 or more: a
    dozen products of ``N x D`` matrices and a few ``N x N`` matrices of memory. Other rules are much slower: the code
    visits every edge, in chunks, and angles take N^3 steps. Second derivatives exist only for inner products and for
    ``mse`` of differences without ``edge_norm``; else a RuntimeError is raised.

    Args:
        student: ``(2, N, D)`` vertices of the real and of the virtual view; gradient flows.
        teacher: ``(2, N, D)``; constant.
        beliefs: ``(2, N, K)`` the student's distribution at each vertex, for the uncertainties; constant.
        rules: how the graphs are compared.
    """
    student, teacher, beliefs = (in_working_precision(x) for x in (student, teacher.detach(), beliefs.detach()))
    unreliable, uncertainty = unreliable_edges(*beliefs, rules)
    if rules.relation == "gram":
        loss, kept = _inner_products(student, teacher, unreliable, rules)
    elif not rules.edge_norm and rules.metric == "mse":
        loss, kept = _plain_differences(student, teacher, unreliable, rules)
    else:
        loss, kept = _Edges.apply(student, teacher, unreliable, rules)
    return Comparison(loss, kept / unreliable.numel(), uncertainty)


def in_working_precision(x: Tensor) -> Tensor:
    """``x`` in float64. In float32 the expanded lengths of near vertices cancel. MPS has float32 only."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def edge_uncertainty(p_real: Tensor, p_virtual: Tensor, kind: str = "cross") -> Tensor:
    """The uncertainty of the edge between two predictions, for all pairs, without gradient.

    Args:
        p_real: ``(B, C)`` distributions p.
        p_virtual: ``(B, C)`` distributions q.
        kind: ``"cross"``: the cross entropy ``-sum_c p_c log q_c``, with q at least the smallest normal number;
            ``"mixture"``: the entropy of ``(p + q) / 2``; ``"sum"``: the entropy of p plus the entropy of q.

    Returns:
        ``(B, B)`` in nats, real views along the rows, in float32 or better.

    Raises:
        InputError: an unknown kind.
    """
    check_choice("UNCERTAINTY", kind, UNCERTAINTIES)
    with torch.no_grad(), torch.autocast(p_real.device.type, enabled=False):
        return _uncertainty(at_least_float32(p_real), at_least_float32(p_virtual), kind)


def _uncertainty(p: Tensor, q: Tensor, kind: str) -> Tensor:
    if kind == "cross":
        return (p @ q.clamp_min(torch.finfo(q.dtype).tiny).log().T).neg_()
    if kind == "sum":
        return torch.special.entr(p).sum(1)[:, None] + torch.special.entr(q).sum(1)
    h = torch.cat([torch.special.entr((p[rows, None] + q) / 2).sum(2) for rows in _chunks(len(p), q.numel())])
    # For equal views, [i, j] and [j, i] are the same mixture, but rounding may differ. A percentile at their value must
    # not keep one and drop the other.
    return torch.where((p == q).all(), (h + h.T) / 2, h)


def unreliable_edges(real: Tensor, virtual: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The edges above the percentile, ``(N, N)`` bool, and the mean uncertainty, ``()``.

    An edge is kept if ``H <= torch.quantile(H, m / 100)``. The code avoids that function's sort and its limit of 16.7
    million entries. The quantile lies between two neighbouring values of the sorted H. So an H at or below the quantile
    is also at or below the lower neighbour.
    """
    with torch.no_grad():
        h = _uncertainty(real, virtual, rules.uncertainty)
        rank = int(rules.prune_percentile / 100 * (h.numel() - 1))
        return h > h.flatten().kthvalue(rank + 1).values, h.mean()


def _count_kept(dropped: Tensor) -> Tensor:
    return dropped.numel() - dropped.count_nonzero()


# Relations with torch's own gradient. Each function returns the loss and the number of kept edges.


def _inner_products(student: Tensor, teacher: Tensor, dropped: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    if rules.edge_norm:
        student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    (x_s, y_s), (x_t, y_t) = student, teacher
    total = rules.of_entries(x_s @ y_s.T, x_t @ y_t.T).masked_fill(dropped, 0).sum()
    kept = _count_kept(dropped)
    return total / rules.scale(kept, 1), kept


def _plain_differences(student: Tensor, teacher: Tensor, dropped: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """``||(x_s - y_s) - (x_t - y_t)||^2`` is ``||u_i - v_j||^2``."""
    (u, v), edges = student - teacher, (~dropped).to(student.dtype)
    ends = (edges.sum(1) * u.square().sum(1)).sum() + (edges.sum(0) * v.square().sum(1)).sum()
    kept = _count_kept(dropped)
    return (ends - 2 * (u * (edges @ v)).sum()) / rules.scale(kept, u.shape[1]), kept


# Edges of unit length, angles, and rules that need every edge


class _Edges(torch.autograd.Function):
    """The loss and the number of kept edges. The forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, dropped: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
        vertices = torch.stack([student, teacher])
        total, gradient, dropped = _sum_over_edges(vertices, dropped, rules, ctx.needs_input_grad[0])
        kept = _count_kept(dropped)
        if rules.relation == "angle":
            scale = rules.scale((~dropped).sum(1).square().sum(), 1)
        else:
            scale = rules.scale(kept, student.shape[2])
        ctx.save_for_backward(gradient.div_(scale) if gradient is not None else None)
        ctx.mark_non_differentiable(kept)
        return total.div_(scale), kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the gradient would silently be a constant
            raise RuntimeError("the gradient of these graph relations cannot be differentiated again")
        return ctx.saved_tensors[0] * grad, None, None, None


def _sum_over_edges(
    vertices: Tensor, dropped: Tensor, rules: Rules, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The sum, its gradient ``(2, N, D)`` to the student's vertices, and the dropped edges, ``(N, N)`` bool.

    Args:
        vertices: ``(2, 2, N, D)``: student and teacher, real and virtual view.
        dropped: ``(N, N)`` bool, the edges that are dropped for their uncertainty.
        rules: how the graphs are compared.
        with_gradient: compute the gradient, else it is ``None``.
    """
    if not rules.edge_norm:
        return *_by_edges(vertices, ~dropped, rules, with_gradient), dropped
    factor = rules.squared_factor if rules.relation == "difference" else None
    # In float64 an edge of 1e-3 times the mean length has 9 digits; `near` marks edges that may be shorter.
    near = torch.empty_like(dropped) if vertices.dtype is torch.float32 or rules.edge_eps < 1e-3 else None
    mean = vertices.mean((1, 2), keepdim=True)  # a shift leaves edges unchanged; smaller numbers cancel less
    centred = vertices.sub_(mean) if near is None and factor is not None else vertices - mean
    lengths, noise = _lengths(vertices, centred, near)
    mean = lengths.mean((1, 2), keepdim=True)
    has_edges = mean > noise
    if rules.edge_eps:
        short = lengths < rules.edge_eps * mean * has_edges
        dropped = dropped | short[0] | short[1]
    if rules.relation == "angle":
        return *_by_angles(vertices, ~dropped, rules, with_gradient), dropped
    if factor is None:
        return *_by_edges(vertices, ~dropped, rules, with_gradient), dropped
    if near is None:
        return *_by_products(centred, lengths, has_edges, dropped, factor, with_gradient), dropped
    total, gradient = _by_edges(vertices, near & ~dropped, rules, with_gradient)
    rest, of_rest = _by_products(centred, lengths, has_edges, near | dropped, factor, with_gradient)
    return total + rest, gradient + of_rest if with_gradient else None, dropped


def _lengths(vertices: Tensor, centred: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lengths ``||x_i - y_j||`` in both networks, ``(2, N, N)``, and the rounding error of their mean, ``(2, 1, 1)``.

    Lengths come from the expanded squares and are at least ``ZERO``. ``near`` ``(N, N)``, if given, receives the edges
    that are so short that they lose digits. Their lengths are computed from the differences.
    """
    squares = torch.linalg.vector_norm(centred, dim=3).square_()
    both = squares[:, 0, :, None] + squares[:, 1, None]
    x, y = centred.unbind(1)
    zero = ZERO[both.dtype]
    lengths = torch.baddbmm(both, x, y.mT, alpha=-2) if near is not None else both.baddbmm_(x, y.mT, alpha=-2)
    if near is not None:
        torch.any(lengths <= NEAR[lengths.dtype] * both, 0, out=near)
    lengths.clamp_min_(zero**2).sqrt_()
    if near is not None:
        for i, j in _pairs(near, vertices):
            lengths[:, i, j] = (vertices[:, 0, i] - vertices[:, 1, j]).norm(dim=2).clamp_min(zero)
    noise = 32 * torch.finfo(both.dtype).eps * squares.amax((1, 2))
    return lengths, noise.clamp_min(4 * zero**2).sqrt()[:, None, None]


def _by_products(
    centred: Tensor, lengths: Tensor, has_edges: Tensor, dropped: Tensor, factor: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum over the kept edges of ``factor * ||e_s - e_t||^2``, and its gradient. ``lengths`` are overwritten.

    With d the differences, n their lengths and ``c = <e_s, e_t>``, the gradient of an edge's ``2 - 2c`` with respect to
    d_s is ``2 (Q d_s - P d_t)``, ``Q = c / n_s^2``, ``P = 1 / (n_s n_t)``. Over all edges, with the row sums of Q and P
    on a diagonal, the gradient is ``(diag(Q 1) x_s - Q y_s) - (diag(P 1) x_t - P y_t)`` for the real vertices x.
    """
    (x_s, y_s), (x_t, y_t) = centred
    inner_x, inner_y = (centred[0] * centred[1]).sum(2)
    # An inverse length of 0 removes a dropped edge from all sums; and all edges if a network's are zero vectors.
    inverse = lengths.reciprocal_()
    inverse_s, inverse_t = inverse
    p = inverse_t.mul_(inverse_s).masked_fill_(dropped, 0).mul_(has_edges.all())
    c = inner_x[:, None] + inner_y
    c = c.addmm_(x_s, y_t.T, alpha=-1).addmm_(x_t, y_s.T, alpha=-1).mul_(p)
    squared_lengths = _count_kept(dropped) * has_edges.sum()
    total = torch.sub(squared_lengths, c.sum(), alpha=2).clamp_min_(0).mul_(factor)
    if not with_gradient:
        return total, None
    q = inverse_s.square_().mul_(c)
    sums = torch.stack([inverse.sum(2), inverse.sum(1)], 1)[..., None]  # of Q and P, over rows and columns
    gradient = (sums[0] * centred[0]).addcmul_(sums[1], centred[1], value=-1)
    gradient[0].addmm_(q, y_s, alpha=-1).addmm_(p, y_t)
    gradient[1].addmm_(q.T, x_s, alpha=-1).addmm_(p.T, x_t)
    return total, gradient.mul_(2 * factor)


def _by_edges(vertices: Tensor, edges: Tensor, rules: Rules, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the metric over ``edges`` ``(N, N)`` and its gradient, computed edge by edge in chunks."""

    def sum_over(student: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # From the vertices as given: the rounding of centred vertices would spoil short edges in float32.
        of_both = (student[0, i] - student[1, j], vertices[1, 0, i] - vertices[1, 1, j])
        return rules.of_entries(*map(_unit, of_both) if rules.edge_norm else of_both).sum()

    return _accumulate(sum_over, vertices[0], _pairs(edges, vertices), with_gradient)


def _by_angles(vertices: Tensor, edges: Tensor, rules: Rules, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the metric over the cosines ``<e_ij, e_ik>`` of pairs of ``edges``, and its gradient."""
    count, width = vertices.shape[2:]

    def sum_over(student: Tensor, rows: slice) -> Tensor:
        units = [_unit(x[rows, None] - y) for x, y in (student, vertices[1])]
        pairs = edges[rows, :, None] & edges[rows, None]
        return rules.of_entries(*(e @ e.mT for e in units)).masked_fill(~pairs, 0).sum()

    chunks = ((rows,) for rows in _chunks(count, count * (count + width)))
    return _accumulate(sum_over, vertices[0], chunks, with_gradient)


def _accumulate(
    part: Callable[..., Tensor], student: Tensor, chunks: Iterator[tuple[Any, ...]], with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of ``part(student, *chunk)`` over chunks, and its gradient to ``student``. Memory holds one chunk."""
    total = student.new_zeros(())
    gradient = torch.zeros_like(student) if with_gradient else None
    for chunk in chunks:
        with torch.set_grad_enabled(with_gradient):
            leaf = student.detach().requires_grad_(with_gradient)
            value = part(leaf, *chunk)
        total += value.detach()
        if with_gradient:
            gradient += torch.autograd.grad(value, leaf)[0]
    return total, gradient


def _unit(difference: Tensor) -> Tensor:
    """``(..., D)`` with unit length. A zero vector stays zero and has no gradient."""
    squares = difference.square().sum(-1, keepdim=True)
    zero = squares == 0
    return difference.masked_fill(zero, 0) / squares.masked_fill(zero, 1).sqrt()


def _pairs(edges: Tensor, vertices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the set entries of an ``(N, N)`` mask, in chunks."""
    pairs = edges.nonzero()
    for rows in _chunks(len(pairs), 2 * vertices.shape[3]):
        yield pairs[rows, 0], pairs[rows, 1]


def _chunks(count: int, entries: int) -> Iterator[slice]:
    """Slices of ``count`` rows, for rows of ``entries`` entries each."""
    step = max(1, CHUNK // entries)
    return (slice(start, start + step) for start in range(0, count, step))
