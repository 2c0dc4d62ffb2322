"""VRM: match the relations between real and virtual views, sample by sample and class by class.

Zhang, Xie, Cai, Ma. VRM: Knowledge Distillation via Virtual Relation Matching. ICCV 2025. Equations and sections are
those of the arXiv version, "Knowledge Distillation via Virtual Relation Matching"; Algorithm 1 and Sec. 8 are the
supplement's. Shapes: B images, C classes.

With ``p_r``, ``p_v`` ``(B, C)`` the predictions for the real (weak) and the virtual (strong) view and ``w_r``, ``w_v``
their columns, the edges of the two virtual graphs are

- inter-sample: ``e_ISV[i, j] = (p_r[i] - p_v[j]) / ||p_r[i] - p_v[j]||``, a ``[B, B, C]`` tensor (Eq. 1, Sec. 3.5);
- inter-class: ``e_ICV[a, b] = (w_r[a] - w_v[b]) / ||w_r[a] - w_v[b]||``, a ``[C, C, B]`` tensor (Sec. 3.4, 3.5).

Student's and teacher's edges are compared, without those that the student is least certain of (Eq. 2):
``CE(real) + CE(virtual) + ALPHA * L_ISV + BETA * L_ICV`` (Eq. 3). Neither edge tensor is ever written out: for unit
vectors ``||e_s - e_t||^2 = 2 - 2 <e_s, e_t>``, and ``<a - b, c - d>`` expands into products of ``B x B`` matrices
(``C x C`` for the classes).

The paper leaves open what follows; these are our readings, and each has a key:

- vertices are ``softmax(ZSNorm(adaptor(z)) / TEMPERATURE)``, predictions rather than raw logits, as Algorithm 1 and
  the experiments on features suggest; ``ZSNORM`` and ``ADAPTOR`` switch the two designs of Sec. 3.7;
- the logit adaptor (``ADAPTOR``): the student's only, for the relations only, gone at inference. ``residual`` is
  ``z + W2 relu(W1 z + b1) + b2`` and starts as the identity, ``mlp`` is the same without the skip, ``none`` is none;
- ``METRIC``: the squared difference of Algorithm 1; the main text does not say;
- ``REDUCTION``: the mean over all entries of the kept edges. Algorithm 1's plain sum is 10^6 times that, for which the
  weights 128 and 32 make no sense;
- ``PRUNE_PERCENTILE``: 95, the paper gives none. An edge goes if its uncertainty lies *above* the percentile, as in
  Eq. 2; Algorithm 1's ``<`` would drop one more. 100 keeps all;
- ``UNCERTAINTY``: the paper says joint entropy, and that it grows with the discrepancy of two predictions and comes
  down to their own entropy as they align. The joint entropy of independent variables (``sum``) does neither, the
  cross entropy ``H(p) + KL(p || q)`` (``cross``) and the entropy of the mixture (``mixture``) do both;
- ``ICV_NORMALIZE``: the uncertainty of two classes is that of their columns normalised to sum 1 over the batch;
- ``EDGE_EPS``: an edge shorter, in either network, than this share of its graph's mean length is dropped with the
  pruned ones. The gradient of a normalised edge grows as 1 / length, and two views of an image may be identical;
- ``CE_WEIGHT``, ``CE_VIRTUAL_WEIGHT``: the cross-entropies of both views are summed;
- ``JOINT_FORWARD``: off, the student's views pass one by one, so that BatchNorm doesn't mix their statistics;
- ``WARMUP``: epochs in which the weights of the relations rise linearly, 0 by default. The term's gradient is large
  where the student's logits are tiny;
- on several devices, the graphs are those of each device's own images.

What ZSNorm implies: at temperature 4 the predictions are nearly flat, and uncertainties differ little. So relations are
computed in float32 or better under autocast too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, zs_norm
from mdistiller.registry import InputError, suggestion

from ._base import Distiller, register_distiller
from ._common import count_classes, warmup

DEFAULTS = {
    "ALPHA": 128.0,  # weight of the inter-sample relations
    "BETA": 32.0,  # weight of the inter-class relations
    "CE_WEIGHT": 1.0,
    "CE_VIRTUAL_WEIGHT": 1.0,
    "WARMUP": 0,  # epochs in which ALPHA and BETA rise linearly
    "TEMPERATURE": 4.0,
    "ZSNORM": True,
    "ADAPTOR": "residual",  # residual, mlp, none
    "METRIC": "mse",  # mse, l1, huber, cosine
    "HUBER_DELTA": 1.0,
    "REDUCTION": "element",  # element, edge, sum
    "PRUNE_PERCENTILE": 95.0,
    "UNCERTAINTY": "cross",  # cross, mixture, sum
    "ICV_NORMALIZE": True,
    "EDGE_EPS": 1e-3,
    "JOINT_FORWARD": False,
}
PAPER = "Zhang et al., VRM: Knowledge Distillation via Virtual Relation Matching, ICCV 2025"

METRICS = ("mse", "l1", "huber", "cosine")
REDUCTIONS = ("element", "edge", "sum")
UNCERTAINTIES = ("cross", "mixture", "sum")
ADAPTORS = ("residual", "mlp", "none")

CHUNK = 2**19  # entries of a temporary tensor: 4 MB in float64
# Expanding |x - y|^2 loses digits of short edges. Relative to |x|^2 + |y|^2, what lies below NOISE is rounding and
# counts as zero; what lies below NEAR is computed from the difference instead, where such short edges are kept.
NOISE = 32 * torch.finfo(torch.float64).eps
NEAR = {torch.float64: 1e-6, torch.float32: 1e-2}


def vrm_loss(
    p_real_s: Tensor,
    p_virtual_s: Tensor,
    p_real_t: Tensor,
    p_virtual_t: Tensor,
    *,
    prune_percentile: float = 95.0,
    metric: str = "mse",
    reduction: str = "element",
    uncertainty: str = "cross",
    edge_eps: float = 1e-3,
    huber_delta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Distance of the student's virtual relations to the teacher's, between samples and between classes.

    An edge is kept if the student's uncertainty of it is at most the percentile of its graph, and if it is not
    shorter than ``edge_eps`` times its graph's mean length in either network. Without kept edges the loss is zero.

    Cost: a dozen products of ``B x C`` matrices and a few ``B x B`` and ``C x C`` matrices of memory for ``mse``,
    ``cosine``, and ``huber`` with ``huber_delta`` of 2 or more. Entries of two unit vectors differ by up to 2, so a
    smaller delta does not reduce to a product; it and ``l1`` compute edge by edge, in chunks, which is much slower.
    All in float64, or in float32 on devices that have nothing better (MPS). The gradient can be taken once.

    Args:
        p_real_s: ``(B, C)`` the student's class probabilities for the real views; gradient flows.
        p_virtual_s: ``(B, C)`` for the virtual views; gradient flows.
        p_real_t: ``(B, C)`` the teacher's; constant, as is the next.
        p_virtual_t: ``(B, C)``.
        prune_percentile: in [0, 100]; 100 prunes nothing, 0 leaves the most certain edge.
        metric: of student's and teacher's edge, entry by entry: ``"mse"`` the squared difference; ``"l1"``;
            ``"huber"``; ``"cosine"`` half the squared difference, which summed over a unit edge is 1 - cosine.
        reduction: ``"element"`` mean over the entries of the kept edges; ``"edge"`` sum over an edge's entries, mean
            over the kept edges; ``"sum"`` over all entries of the kept edges.
        uncertainty: see :func:`edge_uncertainty`.
        edge_eps: 0 drops no edge for its length; an edge of length zero is a zero vector then, without gradient.
        huber_delta: where Huber's loss turns from half the square to linear.

    Returns:
        The inter-sample and the inter-class loss, each ``()`` and unweighted, in float32 or better.

    Raises:
        InputError: an unknown name, a value out of range, or shapes that differ.
    """
    rules = Rules(prune_percentile, metric, reduction, uncertainty, edge_eps, huber_delta)
    isv, icv, _ = virtual_relations(p_real_s, p_virtual_s, p_real_t, p_virtual_t, rules)
    return isv, icv


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
    if kind not in UNCERTAINTIES:
        raise InputError(
            f"uncertainty (config key VRM.UNCERTAINTY): no {kind!r}; {suggestion(str(kind), UNCERTAINTIES)}"
        )
    with torch.no_grad(), torch.autocast(p_real.device.type, enabled=False):
        return _uncertainty(at_least_float32(p_real), at_least_float32(p_virtual), kind)


def _uncertainty(p: Tensor, q: Tensor, kind: str) -> Tensor:
    if kind == "cross":
        return (p @ q.clamp_min(torch.finfo(q.dtype).tiny).log().T).neg_()
    if kind == "sum":
        return torch.special.entr(p).sum(1)[:, None] + torch.special.entr(q).sum(1)
    return torch.cat([torch.special.entr((p[rows, None] + q) / 2).sum(2) for rows in _chunks(len(p), q.numel())])


@dataclass(frozen=True)
class Rules:
    """How two graphs are compared: the options of :func:`vrm_loss`, checked, and ``icv_normalize``."""

    prune_percentile: float = 95.0
    metric: str = "mse"
    reduction: str = "element"
    uncertainty: str = "cross"
    edge_eps: float = 1e-3
    huber_delta: float = 1.0
    icv_normalize: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("metric", METRICS), ("reduction", REDUCTIONS), ("uncertainty", UNCERTAINTIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{_named(name)}: no {value!r}; {suggestion(str(value), allowed)}")
        if not 0 <= self.prune_percentile <= 100:
            raise InputError(f"{_named('prune_percentile')} must be from 0 to 100, got {self.prune_percentile}")
        if not 0 <= self.edge_eps < float("inf"):
            raise InputError(f"{_named('edge_eps')} must be 0 or more, got {self.edge_eps}")
        if not self.huber_delta > 0:
            raise InputError(f"{_named('huber_delta')} must be above 0, got {self.huber_delta}")

    @property
    def product_factor(self) -> float | None:
        """The metric as a multiple of the squared difference; ``None`` where it is none."""
        if self.metric == "mse":
            return 1.0
        if self.metric == "cosine" or (self.metric == "huber" and self.huber_delta >= 2):
            return 0.5
        return None

    def of_entries(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """The metric and its derivative, entry by entry."""
        if self.metric == "l1":
            return difference.abs(), difference.sign()
        if self.metric == "huber":
            clamped = difference.clamp(-self.huber_delta, self.huber_delta)
            return clamped * (difference - 0.5 * clamped), clamped
        return self.product_factor * difference.square(), 2 * self.product_factor * difference

    def scale(self, edges: int | Tensor, entries: int) -> float | Tensor:
        """What the sum over all entries is divided by, for ``edges`` kept edges of so many entries each."""
        return {"element": edges * entries, "edge": edges, "sum": 1}[self.reduction]


def _named(option: str) -> str:
    return f"{option} (config key VRM.{option.upper()})"


def virtual_relations(
    p_real_s: Tensor, p_virtual_s: Tensor, p_real_t: Tensor, p_virtual_t: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both losses of :func:`vrm_loss`, and of each graph the share of kept edges and the mean uncertainty."""
    inputs = (p_real_s, p_virtual_s, p_real_t, p_virtual_t)
    if p_real_s.ndim != 2 or any(p.shape != p_real_s.shape for p in inputs):
        raise InputError(f"VRM takes four tensors of one shape (B, C), got {[tuple(p.shape) for p in inputs]}")
    isv, icv, facts = _VirtualRelations.apply(p_real_s, p_virtual_s, p_real_t.detach(), p_virtual_t.detach(), rules)
    names = ("kept_isv", "uncertainty_isv", "kept_icv", "uncertainty_icv")
    return isv, icv, dict(zip(names, facts.unbind(), strict=True))


class _VirtualRelations(torch.autograd.Function):
    """The losses of both graphs, with their gradients computed along with them."""

    @staticmethod
    def forward(
        ctx: Any, p_real_s: Tensor, p_virtual_s: Tensor, p_real_t: Tensor, p_virtual_t: Tensor, rules: Rules
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(p_real_s.device.type, enabled=False):
            given = torch.stack([p_real_s, p_virtual_s, p_real_t, p_virtual_t]).unflatten(0, (2, 2))
            vertices = given.to(_working_dtype(given))
            isv = _compare(vertices, rules, False, any(ctx.needs_input_grad))
            icv = _compare(vertices.mT, rules, rules.icv_normalize, any(ctx.needs_input_grad))
        dtype = at_least_float32(p_real_s).dtype
        ctx.save_for_backward(isv.gradient.to(dtype), icv.gradient.mT.to(dtype))
        facts = torch.stack([isv.kept, isv.uncertainty, icv.kept, icv.uncertainty]).float()
        ctx.mark_non_differentiable(facts)
        return isv.loss.to(dtype), icv.loss.to(dtype), facts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_isv: Tensor, grad_icv: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_isv, of_icv = ctx.saved_tensors
        real, virtual = grad_isv * of_isv + grad_icv * of_icv
        return real, virtual, None, None, None


class _Comparison(NamedTuple):
    """What the comparison of two graphs gives; ``gradient`` ``(2, N, D)`` is that of the student's two views."""

    loss: Tensor
    gradient: Tensor
    kept: Tensor
    uncertainty: Tensor


def _compare(vertices: Tensor, rules: Rules, normalize: bool, with_gradient: bool) -> _Comparison:
    """Compare the student's and the teacher's graph.

    Args:
        vertices: ``(2, 2, N, D)``: student and teacher, real and virtual view, N vertices of D entries.
        rules: how.
        normalize: make distributions of the vertices before the uncertainty is taken.
        with_gradient: else ``gradient`` is zero.
    """
    keep, uncertainty = _reliable_edges(*vertices[0], rules, normalize)
    centred = vertices - vertices.mean((1, 2), keepdim=True)  # edges stay the same, smaller numbers cancel less
    # In float64 an edge of 1e-3 times the mean length still has 9 digits; shorter ones are looked after.
    near = None
    if vertices.dtype is torch.float32 or rules.edge_eps < 1e-3:
        near = torch.empty_like(keep)
    lengths = _lengths(vertices, centred, near)
    if rules.edge_eps:
        keep &= (lengths >= rules.edge_eps * lengths.mean((1, 2), keepdim=True)).all(0)
    gradient = torch.zeros_like(vertices[0])
    add_to = gradient if with_gradient else None
    factor = rules.product_factor
    if factor is None:
        total = _by_entries(vertices, keep, rules, add_to)
    elif near is None:
        total = _by_products(centred, lengths, keep, factor, add_to)
    else:
        total = _by_entries(vertices, keep & near, rules, add_to)
        total += _by_products(centred, lengths, keep & ~near, factor, add_to)
    count = keep.sum()
    scale = rules.scale(count.clamp_min(1), vertices.shape[-1])
    return _Comparison(total.clamp_min(0) / scale, gradient.div_(scale), count / keep.numel(), uncertainty)


def _reliable_edges(real: Tensor, virtual: Tensor, rules: Rules, normalize: bool) -> tuple[Tensor, Tensor]:
    """The ``(N, N)`` mask of Eq. 2, and the mean uncertainty ``()``.

    ``H <= torch.quantile(H, m / 100)``, without the sort and its limit of 16.7 million entries: the quantile lies
    between two neighbours in size, so what lies at or below it lies at or below the lower one.
    """
    if normalize:
        tiny = torch.finfo(real.dtype).tiny
        real, virtual = (p / p.sum(1, keepdim=True).clamp_min(tiny) for p in (real, virtual))
    h = _uncertainty(real, virtual, rules.uncertainty)
    rank = int(rules.prune_percentile / 100 * (h.numel() - 1))
    return h <= h.flatten().kthvalue(rank + 1).values, h.mean()


def _lengths(vertices: Tensor, centred: Tensor, near: Tensor | None) -> Tensor:
    """``(2, N, N)`` lengths ``||x_i - y_j||`` in both networks, from the expanded squares.

    Where ``near`` ``(N, N)`` is given, it is set to which edges are short enough to have lost digits, and those are
    computed from the differences. Else lengths of the size of the rounding become zero.
    """
    squares_x, squares_y = centred.square().sum(3).unbind(1)
    (x, y), count = centred.unbind(1), centred.shape[2]
    lengths = centred.new_empty(2, count, count)
    for rows in _chunks(count, 2 * count):
        both = squares_x[:, rows, None] + squares_y[:, None]
        squares = torch.baddbmm(both, x[:, rows], y.mT, alpha=-2)
        if near is None:
            squares.masked_fill_(squares <= NOISE * both, 0)
        else:
            near[rows] = (squares <= NEAR[squares.dtype] * both).any(0)
            squares.clamp_min_(0)
        torch.sqrt(squares, out=lengths[:, rows])
    if near is not None:
        for i, j in _pairs(near, vertices):
            lengths[:, i, j] = _differences(vertices, i, j).norm(dim=2)
    return lengths


def _by_products(centred: Tensor, lengths: Tensor, edges: Tensor, factor: float, gradient: Tensor | None) -> Tensor:
    """Sum over ``edges`` ``(N, N)`` of ``factor * ||e_s - e_t||^2``; its gradient is added to ``gradient``.

    With d the differences, n their lengths and ``c = <e_s, e_t>``, the gradient of an edge's ``2 - 2c`` with respect
    to d_s is ``2 (Q d_s - P d_t)``, ``Q = c / n_s^2``, ``P = 1 / (n_s n_t)``. Over all edges, with the row sums of Q
    and P on a diagonal, that makes ``(diag(Q 1) x_s - Q y_s) - (diag(P 1) x_t - P y_t)`` for the real vertices x.
    ``lengths`` are overwritten.
    """
    (x, y), count = centred.unbind(1), centred.shape[2]
    inner_x, inner_y = (centred[0] * centred[1]).sum(2)
    # No edge, no inverse length: it drops out of all that follows. A zero vector drops out on its side.
    inverse = lengths.masked_fill_(~(edges & (lengths > 0)), torch.inf).reciprocal_()
    total = inverse.count_nonzero()  # squared lengths
    sums_x, sums_y = centred.new_zeros(2, 2, count)  # of Q and of P, along the rows and along the columns
    for rows in _chunks(count, 2 * count):
        qp = torch.empty_like(inverse[:, rows])
        q, p = qp
        torch.mul(inverse[0, rows], inverse[1, rows], out=p)
        c = torch.add(inner_x[rows, None], inner_y, out=q)
        c.addmm_(x[0, rows], y[1].T, alpha=-1).addmm_(x[1, rows], y[0].T, alpha=-1).mul_(p)
        total = total - 2 * c.sum()
        if gradient is not None:
            q.mul_(inverse[0, rows]).mul_(inverse[0, rows])
            sums_x[:, rows] = qp.sum(2)
            sums_y += qp.sum(1)
            gradient[0, rows].addmm_(q, y[0], alpha=-2 * factor).addmm_(p, y[1], alpha=2 * factor)
            gradient[1].addmm_(q.T, x[0, rows], alpha=-2 * factor).addmm_(p.T, x[1, rows], alpha=2 * factor)
    if gradient is not None:
        for of_view, z, (sum_q, sum_p) in zip(gradient, (x, y), (sums_x, sums_y), strict=True):
            of_view.addcmul_(sum_q[:, None], z[0], value=2 * factor).addcmul_(sum_p[:, None], z[1], value=-2 * factor)
    return factor * total


def _by_entries(vertices: Tensor, edges: Tensor, rules: Rules, gradient: Tensor | None) -> Tensor:
    """Sum of the metric over ``edges``, edge by edge in chunks; its gradient is added to ``gradient``."""
    total = vertices.new_zeros(())
    for i, j in _pairs(edges, vertices):
        differences = _differences(vertices, i, j)
        lengths = differences.norm(dim=2, keepdim=True)
        unit = torch.where(lengths > 0, differences / lengths, 0)
        value, slope = rules.of_entries(unit[0] - unit[1])
        total += value.sum()
        if gradient is not None:
            slope -= unit[0] * (slope * unit[0]).sum(1, keepdim=True)
            slope = torch.where(lengths[0] > 0, slope / lengths[0], 0)
            gradient[0].index_add_(0, i, slope)
            gradient[1].index_add_(0, j, slope, alpha=-1)
    return total


def _pairs(edges: Tensor, vertices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of what is set in an ``(N, N)`` mask, in chunks."""
    pairs = edges.nonzero()
    for rows in _chunks(len(pairs), 2 * vertices.shape[3]):
        yield pairs[rows, 0], pairs[rows, 1]


def _differences(vertices: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``(2, M, D)`` edges in both networks before they are normalised.

    Of the vertices as given: centring rounds, which short edges do not bear in float32.
    """
    return vertices[:, 0, i] - vertices[:, 1, j]


def _chunks(count: int, entries: int) -> Iterator[slice]:
    """Slices of ``count`` rows of so many entries each."""
    step = max(1, CHUNK // entries)
    return (slice(start, start + step) for start in range(0, count, step))


def _working_dtype(tensor: Tensor) -> torch.dtype:
    """float64: in float32 the expanded lengths of near vertices cancel. MPS has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class LogitAdaptor(nn.Module):
    """MLP on the student's logits, ``(B, C)`` to ``(B, C)``.

    Args:
        num_classes: C, also the hidden width.
        residual: add the logits to the output, and start with zero output weights, hence as the identity. Without it,
            the ReLU keeps the module from starting so, and the first gradients have nothing to do with the logits'.
    """

    def __init__(self, num_classes: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mlp = nn.Sequential(nn.Linear(num_classes, num_classes), nn.ReLU(), nn.Linear(num_classes, num_classes))
        if residual:
            nn.init.zeros_(self.mlp[2].weight)
            nn.init.zeros_(self.mlp[2].bias)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.mlp(logits) if self.residual else self.mlp(logits)


@register_distiller("VRM", DEFAULTS, paper=PAPER, family="relation", weights=("ALPHA", "BETA"))
class VRM(Distiller):
    """Cross-entropy on both views plus :func:`vrm_loss` on their predictions; no other term on the logits.

    The weak view is the paper's real one, the strong view its virtual one. The frozen teacher takes both in one pass.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.VRM
        self.alpha, self.beta = own.ALPHA, own.BETA
        self.ce_weight, self.ce_virtual_weight = own.CE_WEIGHT, own.CE_VIRTUAL_WEIGHT
        self.warmup = own.WARMUP
        self.temperature = own.TEMPERATURE
        self.zsnorm = own.ZSNORM
        self.joint_forward = own.JOINT_FORWARD
        self.rules = Rules(
            own.PRUNE_PERCENTILE,
            own.METRIC,
            own.REDUCTION,
            own.UNCERTAINTY,
            own.EDGE_EPS,
            own.HUBER_DELTA,
            own.ICV_NORMALIZE,
        )
        if not self.temperature > 0:
            raise InputError(f"VRM.TEMPERATURE must be above 0, got {self.temperature}")
        num_classes = count_classes(student)
        if self.zsnorm and num_classes is not None and num_classes <= 2:
            raise InputError(
                f"VRM.ZSNORM: with {num_classes} classes ZSNorm leaves nothing of a prediction but which class is "
                "ahead; set VRM.ZSNORM False"
            )
        self.adaptor = make_adaptor(own.ADAPTOR, num_classes)

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        both_views = torch.cat([image_weak, image_strong])
        if self.joint_forward:
            real, virtual = self.student(both_views)[0].chunk(2)
        else:
            (real, _), (virtual, _) = self.student(image_weak), self.student(image_strong)
        with torch.no_grad():
            teacher_real, teacher_virtual = self.teacher(both_views)[0].chunk(2)
        with torch.autocast(real.device.type, enabled=False):
            isv, icv, facts = virtual_relations(
                self.predict(self.adaptor(at_least_float32(real))),
                self.predict(self.adaptor(at_least_float32(virtual))),
                self.predict(at_least_float32(teacher_real)),
                self.predict(at_least_float32(teacher_virtual)),
                self.rules,
            )
        self.monitors = facts
        rise = warmup(epoch, self.warmup)
        return real, {
            "loss_ce": self.ce_weight * F.cross_entropy(real, target),
            "loss_ce_virtual": self.ce_virtual_weight * F.cross_entropy(virtual, target),
            "loss_isv": rise * self.alpha * isv,
            "loss_icv": rise * self.beta * icv,
        }

    def predict(self, logits: Tensor) -> Tensor:
        """The vertices ``(B, C)``: probabilities at the temperature."""
        return F.softmax((zs_norm(logits) if self.zsnorm else logits) / self.temperature, dim=1)


def make_adaptor(kind: str, num_classes: int | None) -> nn.Module:
    """The module that ``VRM.ADAPTOR`` names, with seeded weights; the random generator is left as it was."""
    if kind not in ADAPTORS:
        raise InputError(f"VRM.ADAPTOR: no {kind!r}; {suggestion(str(kind), ADAPTORS)}")
    if kind == "none":
        return nn.Identity()
    if num_classes is None:
        raise InputError(
            "VRM.ADAPTOR: the number of classes is read off the student's last nn.Linear, and this student has none; "
            "set VRM.ADAPTOR none"
        )
    with torch.random.fork_rng(devices=[]):
        return LogitAdaptor(num_classes, residual=kind == "residual")
