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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32
from mdistiller.registry import InputError, suggestion

from ._base import Distiller, register_distiller

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

CHUNK = 2**18  # entries of a temporary tensor: 2 MB in float64, which the processor's cache holds
# Relative to |x|^2 + |y|^2, an expanded |x - y|^2 below this ...
NOISE = 32 * torch.finfo(torch.float64).eps  # ... is rounding and counts as zero.
NEAR = {torch.float64: 1e-6, torch.float32: 1e-2}  # ... has lost digits: computed from the difference where they matter.


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
        raise InputError(f"uncertainty (config key VRM.UNCERTAINTY): no {kind!r}; {suggestion(str(kind), UNCERTAINTIES)}")
    p, q = at_least_float32(p_real.detach()), at_least_float32(p_virtual.detach())
    with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
        if kind == "cross":
            return -(p @ q.clamp_min(torch.finfo(q.dtype).tiny).log().T)
        if kind == "sum":
            return torch.special.entr(p).sum(1)[:, None] + torch.special.entr(q).sum(1)
        mixtures = [torch.special.entr((p[rows, None] + q) / 2).sum(2) for rows in _chunks(len(p), q.numel())]
        return torch.cat(mixtures)


def zs_norm(logits: Tensor) -> Tensor:
    """Each sample's logits with mean 0 and standard deviation 1 over the classes (ZSNorm, Sec. 3.7).

    As in LSKD (Sun et al., arXiv:2403.01427), whose design it is: unbiased deviation, 1e-7 added to it.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


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
        if not 0 < self.huber_delta:
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
    p_real_s, p_virtual_s, p_real_t, p_virtual_t = (at_least_float32(p) for p in inputs)
    p_real_t, p_virtual_t = p_real_t.detach(), p_virtual_t.detach()
    losses, facts = {}, {}
    for graph, real_s, virtual_s, real_t, virtual_t in (
        ("isv", p_real_s, p_virtual_s, p_real_t, p_virtual_t),
        ("icv", p_real_s.T, p_virtual_s.T, p_real_t.T, p_virtual_t.T),
    ):
        normalize = graph == "icv" and rules.icv_normalize
        reliable, facts[f"uncertainty_{graph}"] = _reliable_edges(real_s, virtual_s, rules, normalize)
        losses[graph], facts[f"kept_{graph}"] = _EdgeDistance.apply(
            real_s, virtual_s, real_t, virtual_t, reliable, rules
        )
    return losses["isv"], losses["icv"], facts


@torch.no_grad()
def _reliable_edges(real: Tensor, virtual: Tensor, rules: Rules, normalize: bool) -> tuple[Tensor, Tensor]:
    """The ``(N, N)`` mask of Eq. 2, and the mean uncertainty ``()``.

    ``H <= torch.quantile(H, m / 100)``, without the sort and its limit of 16.7 million entries: the quantile lies
    between two neighbours in size, so what lies at or below it lies at or below the lower one.
    """
    real, virtual = (p.to(_working_dtype(p)) for p in (real, virtual))
    if normalize:
        tiny = torch.finfo(real.dtype).tiny
        real, virtual = (p / p.sum(1, keepdim=True).clamp_min(tiny) for p in (real, virtual))
    h = edge_uncertainty(real, virtual, rules.uncertainty)
    rank = int(rules.prune_percentile / 100 * (h.numel() - 1))
    return h <= h.flatten().kthvalue(rank + 1).values, h.mean().float()


class _EdgeDistance(torch.autograd.Function):
    """Distance of two graphs' kept edges, with the gradient computed along with it.

    ``apply(real_s, virtual_s, real_t, virtual_t, reliable, rules)`` of vertices ``(N, D)`` and a mask ``(N, N)`` gives
    the loss and the share of edges kept.
    """

    @staticmethod
    def forward(
        ctx: Any, real_s: Tensor, virtual_s: Tensor, real_t: Tensor, virtual_t: Tensor, reliable: Tensor, rules: Rules
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(real_s.device.type, enabled=False):
            pair = _PairOfGraphs(real_s, virtual_s, real_t, virtual_t, reliable, rules)
            loss, *gradients = pair.distance(with_gradient=any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(*gradients)
        share = pair.keep.float().mean()
        ctx.mark_non_differentiable(share)
        return loss.to(real_s.dtype), share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_real, grad_virtual = ctx.saved_tensors
        return grad_loss * grad_real, grad_loss * grad_virtual, None, None, None, None


class _PairOfGraphs:
    """The student's and the teacher's graph over one set of N vertices of D entries in each view.

    x are real vertices, y virtual ones; ``x_s[i] - y_s[j]`` is the student's edge before it is normalised.
    """

    def __init__(
        self, real_s: Tensor, virtual_s: Tensor, real_t: Tensor, virtual_t: Tensor, reliable: Tensor, rules: Rules
    ) -> None:
        self.rules = rules
        self.given = (real_s, virtual_s, real_t, virtual_t)
        self.dtype = _working_dtype(real_s)
        self.x_s, self.y_s = self._centred(real_s, virtual_s)
        self.x_t, self.y_t = self._centred(real_t, virtual_t)
        # In float64 an edge of 1e-3 times the mean length still has 9 digits; shorter ones are looked after.
        look_near = self.dtype is torch.float32 or rules.edge_eps < 1e-3
        self.length_s, near_s = self._lengths(self.x_s, self.y_s, (real_s, virtual_s), look_near)
        self.length_t, near_t = self._lengths(self.x_t, self.y_t, (real_t, virtual_t), look_near)
        self.keep = reliable
        for length in (self.length_s, self.length_t):
            self.keep = self.keep & (length >= rules.edge_eps * length.mean())
        self.near = near_s | near_t if look_near else None

    def _centred(self, real: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
        """Differences stay as they are, and smaller numbers cancel less."""
        x, y = real.to(self.dtype), virtual.to(self.dtype)
        centre = (x.mean(0) + y.mean(0)) / 2
        return x - centre, y - centre

    def _lengths(
        self, x: Tensor, y: Tensor, given: tuple[Tensor, Tensor], look_near: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(N, N)`` lengths ``||x_i - y_j||``, and which of them were too short to be expanded."""
        squares_x, squares_y = x.square().sum(1), y.square().sum(1)
        lengths = x.new_empty(len(x), len(y))
        near = torch.empty_like(lengths, dtype=torch.bool) if look_near else None
        for rows in _chunks(len(x), len(y)):
            both = squares_x[rows, None] + squares_y
            squares = torch.addmm(both, x[rows], y.T, alpha=-2)
            if near is None:
                squares.masked_fill_(squares <= NOISE * both, 0)
            else:
                near[rows] = squares <= NEAR[self.dtype] * both
            torch.sqrt(squares.clamp_min_(0), out=lengths[rows])
        if near is not None:
            for i, j in self._pairs(near):
                lengths[i, j] = self._differences(*given, i, j).norm(dim=1)
        return lengths, near

    def distance(self, with_gradient: bool) -> tuple[Tensor, ...]:
        """The reduced loss, and its gradients with respect to the student's real and virtual vertices."""
        grad_x, grad_y = torch.zeros_like(self.x_s), torch.zeros_like(self.y_s)
        gradients = (grad_x, grad_y) if with_gradient else None
        if self.rules.product_factor is None:
            total = self._by_entries(self.keep, gradients)
        elif self.near is None:
            total = self._by_products(self.keep, gradients)
        else:
            total = self._by_products(self.keep & ~self.near, gradients)
            total = total + self._by_entries(self.keep & self.near, gradients)
        edges = self.keep.sum().clamp_min(1)
        scale = self.rules.scale(edges, self.x_s.shape[1])
        real, virtual = self.given[:2]
        return total / scale, (grad_x / scale).to(real.dtype), (grad_y / scale).to(virtual.dtype)

    def _by_products(self, edges: Tensor, gradients: tuple[Tensor, Tensor] | None) -> Tensor:
        """Sum over ``edges`` of ``f * ||e_s - e_t||^2``; adds its gradients.

        With d the differences, n their lengths and c = <e_s, e_t>, the gradient of an edge's 2 - 2c with respect to
        d_s is ``-2 (P d_t - Q d_s)``, ``P = 1 / (n_s n_t)``, ``Q = c / n_s^2``: matrices too.
        """
        x_s, y_s, x_t, y_t = self.x_s, self.y_s, self.x_t, self.y_t
        factor = self.rules.product_factor
        inner_x, inner_y = (x_s * x_t).sum(1), (y_s * y_t).sum(1)
        total = x_s.new_zeros(())
        for rows in _chunks(len(x_s), len(y_s)):
            n_s, n_t, kept = self.length_s[rows], self.length_t[rows], edges[rows]
            lengths = n_s * n_t
            proper = kept & (lengths > 0)  # the others have a zero vector on at least one side: c is 0
            p = lengths.reciprocal_().masked_fill_(~proper, 0)
            c = (inner_x[rows, None] + inner_y).addmm_(x_s[rows], y_t.T, alpha=-1).addmm_(x_t[rows], y_s.T, alpha=-1)
            c *= p
            # A zero vector has length 0 instead of 1.
            total += (kept & (n_s > 0)).sum() + (kept & (n_t > 0)).sum() - 2 * c.sum()
            if gradients is None:
                continue
            grad_x, grad_y = gradients
            p *= 2 * factor
            q = c.mul_(2 * factor).div_(n_s.square().clamp_min_(torch.finfo(n_s.dtype).tiny))
            of_x = q.sum(1, keepdim=True) * x_s[rows] - p.sum(1, keepdim=True) * x_t[rows]
            grad_x[rows] += of_x.addmm_(p, y_t).addmm_(q, y_s, alpha=-1)
            grad_y += q.sum(0)[:, None] * y_s - p.sum(0)[:, None] * y_t
            grad_y.addmm_(p.T, x_t[rows]).addmm_(q.T, x_s[rows], alpha=-1)
        return factor * total

    def _by_entries(self, edges: Tensor, gradients: tuple[Tensor, Tensor] | None) -> Tensor:
        """Sum over ``edges`` of the metric, edge by edge in chunks; adds its gradients."""
        real_s, virtual_s, real_t, virtual_t = self.given
        total = self.x_s.new_zeros(())
        for i, j in self._pairs(edges):
            edge_s, length = _unit(self._differences(real_s, virtual_s, i, j))
            edge_t, _ = _unit(self._differences(real_t, virtual_t, i, j))
            value, slope = self.rules.of_entries(edge_s - edge_t)
            total += value.sum()
            if gradients is not None:
                slope -= edge_s * (slope * edge_s).sum(1, keepdim=True)
                slope = torch.where(length > 0, slope / length, 0)
                gradients[0].index_add_(0, i, slope)
                gradients[1].index_add_(0, j, slope, alpha=-1)
        return total

    def _pairs(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and columns of what is set in an ``(N, N)`` mask, in chunks."""
        pairs = mask.nonzero()
        for rows in _chunks(len(pairs), self.x_s.shape[1]):
            yield pairs[rows, 0], pairs[rows, 1]

    def _differences(self, real: Tensor, virtual: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """From the vertices as given: centred ones carry a rounding that near pairs don't bear in float32."""
        return real[i].to(self.dtype) - virtual[j].to(self.dtype)


def _unit(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at length 1, a zero row as it is; and the lengths ``(M, 1)``."""
    length = differences.norm(dim=1, keepdim=True)
    return torch.where(length > 0, differences / length, 0), length


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
        self.mlp = nn.Sequential(
            nn.Linear(num_classes, num_classes), nn.ReLU(), nn.Linear(num_classes, num_classes)
        )
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
        rise = min(epoch / self.warmup, 1.0) if self.warmup else 1.0
        return real, {
            "loss_ce": self.ce_weight * F.cross_entropy(real, target),
            "loss_ce_virtual": self.ce_virtual_weight * F.cross_entropy(virtual, target),
            "loss_isv": rise * self.alpha * isv,
            "loss_icv": rise * self.beta * icv,
        }

    def predict(self, logits: Tensor) -> Tensor:
        """The vertices ``(B, C)``: probabilities at the temperature."""
        return F.softmax((zs_norm(logits) if self.zsnorm else logits) / self.temperature, dim=1)


def count_classes(network: nn.Module) -> int | None:
    """The classes of a network: the width of its last linear layer, ``None`` where it has none.

    A forward pass would tell too, but takes an input of the right size and disturbs BatchNorm and random states.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else None


def make_adaptor(kind: str, num_classes: int | None) -> nn.Module:
    """The module that ``VRM.ADAPTOR`` names. Its weights follow from the seed, and it leaves the generator as it was."""
    if kind not in ADAPTORS:
        raise InputError(f"VRM.ADAPTOR: no {kind!r}; {suggestion(str(kind), ADAPTORS)}")
    if kind == "none":
        return nn.Identity()
    if num_classes is None:
        raise InputError("VRM.ADAPTOR needs the student's number of classes, which is read off its last nn.Linear, "
                         "and this student has none; set VRM.ADAPTOR none")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return LogitAdaptor(num_classes, residual=kind == "residual")
