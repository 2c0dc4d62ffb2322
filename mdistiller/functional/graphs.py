"""Graphs of relations between the vertices of two views, and how far a student's graph is from its teacher's.

A graph has N vertices x of a real view and N vertices y of a virtual one, D entries each, and an edge from every x to
every y. What an edge says is its *relation* (:class:`Rules`): the difference ``(x_i - y_j) / ||x_i - y_j||`` itself, an
inner product, or the angles between edges. With ``y = x`` it is the graph within one view, in which every edge is there
twice and the diagonal has length zero.

Differences are never written out as ``[N, N, D]`` where that can be helped. For unit vectors ``||e_s - e_t||^2 =
2 - 2 <e_s, e_t>``, and ``<x_s - y_s, x_t - y_t>`` and both lengths expand into products of ``N x N`` matrices, as the
gradient does. What does not expand (L1, Huber with a small delta, angles) is computed in chunks of bounded size.
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
# Expanding |x - y|^2 loses digits of short edges: those whose square is below this share of |x|^2 + |y|^2 are computed
# from the difference instead, where such short edges are kept.
NEAR = {torch.float64: 1e-6, torch.float32: 1e-2}
ZERO = {torch.float64: 1e-150, torch.float32: 1e-18}  # in place of a length of zero: its inverse's square is finite


@dataclass(frozen=True)
class Rules:
    """How two graphs are compared; checked when made, in messages that begin with an option's name in upper case.

    Args:
        prune_percentile: in [0, 100]; edges whose uncertainty lies above this percentile of their graph are dropped.
            100 drops none, 0 leaves the most certain one.
        metric: of student's and teacher's relation, entry by entry: ``"mse"`` the squared difference; ``"l1"``;
            ``"huber"``; ``"cosine"`` half the squared difference, which summed over a unit edge is 1 - cosine.
        reduction: ``"element"`` mean over the entries of the kept relations; ``"edge"`` sum over a relation's entries,
            mean over the kept ones; ``"sum"`` over all entries of the kept ones.
        uncertainty: see :func:`edge_uncertainty`.
        edge_eps: an edge is dropped too where in either network it is shorter than this times its graph's mean length.
            With 0 none is; an edge of length zero is a zero vector then, without gradient.
        huber_delta: where Huber's loss turns from half the square to linear.
        relation: ``"difference"`` D entries; ``"gram"`` one, the inner product of the vertices; ``"angle"`` the cosine
            of the angle at a real vertex between two of its edges, for all pairs of kept edges.
        edge_norm: differences of unit length, or inner products of vertices of unit length (cosines). Where edges
            are not normalised, or are inner products, ``edge_eps`` drops none.

    Raises:
        InputError: an unknown name, a value out of range, or options that make no sense together.
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
        """The metric as a multiple of the squared difference of two unit edges; ``None`` where it is none.

        Their entries differ by up to 2, so Huber's loss is one if it is quadratic up to there.
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
        """What the sum over all entries is divided by, for so many kept relations of so many entries each."""
        return (
            1.0 if self.reduction == "sum" else relations.clamp_min(1) * (entries if self.reduction == "element" else 1)
        )


class Comparison(NamedTuple):
    """The loss, ``()``, and two facts without gradient: the share of edges kept, and the mean uncertainty in nats."""

    loss: Tensor
    kept: Tensor
    uncertainty: Tensor


def compare_graphs(student: Tensor, teacher: Tensor, beliefs: Tensor, rules: Rules) -> Comparison:
    """How far the student's graph is from the teacher's.

    Cost: a dozen products of ``N x D`` matrices and a few ``N x N`` matrices of memory for differences under ``mse``,
    ``cosine``, and ``huber`` with ``huber_delta`` of 2 or more, and for inner products. The rest is computed edge by
    edge in chunks, angles even in N^3 steps, which is much slower. All in float64, or in float32 on devices that have
    nothing better (MPS). Gradients of gradients are refused, but for inner products and edges without normalising.

    Args:
        student: ``(2, N, D)`` vertices of the real and of the virtual view; gradient flows.
        teacher: ``(2, N, D)``, constant.
        beliefs: ``(2, N, K)`` the student's distribution at each vertex, constant: what uncertainties are taken of.
        rules: how.
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
    """float64: in float32 the expanded lengths of near vertices cancel. MPS has none."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def edge_uncertainty(p_real: Tensor, p_virtual: Tensor, kind: str = "cross") -> Tensor:
    """How uncertain the edge between two predictions is, for all pairs, without gradient.

    Args:
        p_real: ``(B, C)`` distributions p.
        p_virtual: ``(B, C)`` distributions q.
        kind: ``"cross"`` the cross entropy ``-sum_c p_c log q_c``, with logarithms of zero cut off at that of the
            smallest normal number; ``"mixture"`` the entropy of ``(p + q) / 2``; ``"sum"`` that of p plus that of q.

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
    # Of equal views, [i, j] and [j, i] are the same mixture, but may be summed in another order: a percentile that
    # lies on them must not keep one and drop the other.
    return torch.where((p == q).all(), (h + h.T) / 2, h)


def unreliable_edges(real: Tensor, virtual: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The edges above the percentile, ``(N, N)`` bool, and the mean uncertainty, ``()``.

    An edge is kept if ``H <= torch.quantile(H, m / 100)``, without that function's sort and its limit of 16.7 million
    entries: the quantile lies between two neighbours in size, so what lies at or below it lies at or below the lower.
    """
    with torch.no_grad():
        h = _uncertainty(real, virtual, rules.uncertainty)
        rank = int(rules.prune_percentile / 100 * (h.numel() - 1))
        return h > h.flatten().kthvalue(rank + 1).values, h.mean()


def _count_kept(dropped: Tensor) -> Tensor:
    return dropped.numel() - dropped.count_nonzero()


# Relations that plain tensor operations differentiate. Each gives the loss and how many edges were kept.


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


# Edges of unit length, angles, and what must be written out


class _Edges(torch.autograd.Function):
    """The loss and how many edges were kept; the gradient is computed along with it."""

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
        if torch.is_grad_enabled():  # create_graph: the gradient would count as a constant, and nobody would notice
            raise RuntimeError("the gradient of these graph relations cannot be differentiated again")
        return ctx.saved_tensors[0] * grad, None, None, None


def _sum_over_edges(
    vertices: Tensor, dropped: Tensor, rules: Rules, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The sum, its gradient ``(2, N, D)`` to the student's vertices, and the edges dropped, ``(N, N)`` bool.

    Args:
        vertices: ``(2, 2, N, D)``: student and teacher, real and virtual view.
        dropped: ``(N, N)`` bool, what is dropped for its uncertainty.
        rules: how.
        with_gradient: else the gradient is ``None``.
    """
    if not rules.edge_norm:
        return *_by_edges(vertices, ~dropped, rules, with_gradient), dropped
    factor = rules.squared_factor if rules.relation == "difference" else None
    # In float64 an edge of 1e-3 times the mean length still has 9 digits; shorter ones are looked after.
    near = torch.empty_like(dropped) if vertices.dtype is torch.float32 or rules.edge_eps < 1e-3 else None
    mean = vertices.mean((1, 2), keepdim=True)  # without it edges stay the same, and smaller numbers cancel less
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
    """``(2, N, N)`` lengths ``||x_i - y_j||`` in both networks, and what a mean of them has by rounding, ``(2, 1, 1)``.

    Lengths come from the expanded squares and are at least ``ZERO``. Where ``near`` ``(N, N)`` is given, it is set to
    which edges are short enough to have lost digits, and those are computed from the differences.
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
    """Sum over the kept edges of ``factor * ||e_s - e_t||^2``, and its gradient. ``lengths`` are overwritten.

    With d the differences, n their lengths and ``c = <e_s, e_t>``, the gradient of an edge's ``2 - 2c`` with respect
    to d_s is ``2 (Q d_s - P d_t)``, ``Q = c / n_s^2``, ``P = 1 / (n_s n_t)``. Over all edges, with the row sums of Q
    and P on a diagonal, that makes ``(diag(Q 1) x_s - Q y_s) - (diag(P 1) x_t - P y_t)`` for the real vertices x.
    """
    (x_s, y_s), (x_t, y_t) = centred
    inner_x, inner_y = (centred[0] * centred[1]).sum(2)
    # No edge, no inverse length: it drops out of all that follows. So do all where a network's edges are zero vectors.
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
    sums = torch.stack([inverse.sum(2), inverse.sum(1)], 1)[..., None]  # of Q and P; along the rows and the columns
    gradient = (sums[0] * centred[0]).addcmul_(sums[1], centred[1], value=-1)
    gradient[0].addmm_(q, y_s, alpha=-1).addmm_(p, y_t)
    gradient[1].addmm_(q.T, x_s, alpha=-1).addmm_(p.T, x_t)
    return total, gradient.mul_(2 * factor)


def _by_edges(vertices: Tensor, edges: Tensor, rules: Rules, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the metric over ``edges`` ``(N, N)``, written out in chunks, and its gradient."""

    def sum_over(student: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Of the vertices as given: centring rounds, which short edges do not bear in float32.
        of_both = (student[0, i] - student[1, j], vertices[1, 0, i] - vertices[1, 1, j])
        return rules.of_entries(*map(_unit, of_both) if rules.edge_norm else of_both).sum()

    return _accumulate(sum_over, vertices[0], _pairs(edges, vertices), with_gradient)


def _by_angles(vertices: Tensor, edges: Tensor, rules: Rules, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the metric over the cosines ``<e_ij, e_ik>`` of pairs of ``edges``, and its gradient."""
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
    """Sum of ``part(student, *chunk)`` over chunks, and its gradient to ``student``, one chunk in memory at a time."""
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
    """``(..., D)`` with unit length; a zero vector stays one, without gradient."""
    squares = difference.square().sum(-1, keepdim=True)
    zero = squares == 0
    return difference.masked_fill(zero, 0) / squares.masked_fill(zero, 1).sqrt()


def _pairs(edges: Tensor, vertices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of what is set in an ``(N, N)`` mask, in chunks."""
    pairs = edges.nonzero()
    for rows in _chunks(len(pairs), 2 * vertices.shape[3]):
        yield pairs[rows, 0], pairs[rows, 1]


def _chunks(count: int, entries: int) -> Iterator[slice]:
    """Slices of ``count`` rows of so many entries each."""
    step = max(1, CHUNK // entries)
    return (slice(start, start + step) for start in range(0, count, step))
