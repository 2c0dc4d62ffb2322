"""VRM: match the relations between real and virtual views, sample by sample and class by class.

Zhang, Xie, Cai, Ma. VRM: Knowledge Distillation via Virtual Relation Matching. ICCV 2025. Equations and sections are
those of the arXiv version, "Knowledge Distillation via Virtual Relation Matching"; Algorithm 1 and Sec. 8 are the
supplement's. Shapes: B images, C classes.

The real view is the weak one, the virtual view the strong one. With their predictions ``p_r``, ``p_v`` ``(B, C)`` and
the columns ``w_r``, ``w_v`` of the predictions, the edges of the two virtual graphs are

- inter-sample: ``e_ISV[i, j] = (p_r[i] - p_v[j]) / ||p_r[i] - p_v[j]||``, a ``[B, B, C]`` tensor (Eq. 1, Sec. 3.5);
- inter-class: ``e_ICV[a, b] = (w_r[a] - w_v[b]) / ||w_r[a] - w_v[b]||``, a ``[C, C, B]`` tensor (Sec. 3.4, 3.6).

The loss ``CE(real) + CE(virtual) + ALPHA * L_ISV + BETA * L_ICV`` (Eq. 3) compares the student's edges with the
teacher's. Edges drop out if the student is least certain of them (Eq. 2). The code never stores the edge tensors;
``mdistiller/functional/graphs.py`` explains how.

The paper leaves open the following points. These are our readings, each with a key; ``docs/readings.md`` gives the
arguments:

- vertices are ``softmax(ZSNorm(adaptor(z)) / TEMPERATURE)``: predictions, not raw logits, as Algorithm 1 and the
  experiments on features suggest. ``ZSNORM`` and ``ADAPTOR`` switch the two designs of Sec. 3.7;
- the logit adaptor (``ADAPTOR``) belongs to the student, serves the relations only, and is dropped at inference.
  ``residual`` is ``z + W2 relu(W1 z + b1) + b2`` and starts as the identity; ``mlp`` has no skip; ``none``: no adaptor;
- ``METRIC``: the squared difference of Algorithm 1; the main text names no metric;
- ``REDUCTION``: the mean over all entries of the kept edges. Algorithm 1's plain sum is 10^6 times larger and does not
  fit the weights 128 and 32;
- ``PRUNE_PERCENTILE``: 95; the paper gives no value. An edge is dropped if its uncertainty lies *above* the percentile,
  as in Eq. 2; Algorithm 1's ``<`` would drop one more edge. 100 keeps all edges;
- ``UNCERTAINTY``: the paper calls it joint entropy. It also says that the uncertainty grows with the discrepancy of two
  predictions and falls to their own entropy as they align. The joint entropy of independent variables (``sum``) does
  not; the cross entropy ``H(p) + KL(p || q)`` (``cross``) and the entropy of the mixture (``mixture``) do;
- ``UNCERTAINTY_OF``: ``vertices``, as in Eq. 2 and Algorithm 1. After ``ZSNORM`` all images are equally certain there.
  ``predictions``: the student's plain predictions ``softmax(z)``, before adaptor, ZSNorm and temperature, which show
  the student's own certainty;
- ``ICV_NORMALIZE``: the uncertainty of two classes is computed from their columns, normalised to sum 1 over the batch;
- ``EDGE_EPS``: an edge is dropped if, in either network, it is shorter than this share of its graph's mean length. The
  gradient of a normalised edge grows as 1 / length, and two views of an image may be identical;
- ``CE_WEIGHT``, ``CE_VIRTUAL_WEIGHT``: the cross-entropies of both views are summed;
- ``JOINT_FORWARD``: off, the student takes one view after the other, so that BatchNorm does not mix their statistics;
- ``WARMUP``: epochs in which the weights of the relations rise linearly, 0 by default. The term's gradient is large if
  the student's logits are tiny;
- with several devices, a graph holds the images of one device (``SOLVER.GATHER``: of the whole batch).

For the paper's ablations (Tab. 4, 6, 14 to 18, Sec. 3.3, 4.4), with our readings:

- ``VRM_ONE_VIEW``: the graphs within one view, and the cross-entropy of that view. ``GRAPH raw``: the graphs before
  redundant edges are pruned, ``2B x 2B`` between samples, and columns of length 2B between classes. Both are "the
  virtual graph of a view with itself": every edge occurs twice, and the edges on the diagonal are too short to be kept;
- ``VERTEX_WEIGHT``: weight of KD's divergence between the vertices at ``TEMPERATURE``, with the factor T^2, summed over
  the views. ``WARMUP`` does not change this weight;
- ``RELATION``: ``gram`` takes inner products of vertices, which are cosines with ``EDGE_NORM``; ``angle`` takes the
  cosine of the angle at a real vertex between two of its edges. Both are one number, so ``element`` and ``edge`` agree;
- ``EDGE_NORM``: edges of unit length;
- ``LOCATION pooled``: vertices are ``ZSNorm(adaptor(f))`` of the pooled features. Uncertainties are those of their
  softmax at ``TEMPERATURE``. If the widths differ, the adaptor's skip is a linear map to the teacher's width.

After ZSNorm, at temperature 4, the predictions are nearly flat and the uncertainties differ little. So relations are
computed in float32 or better, under autocast too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, graphs, zs_norm
from mdistiller.functional.graphs import Comparison, Rules, compare_graphs, edge_uncertainty, in_working_precision
from mdistiller.options import MANY, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import generator_kept, warmup
from .KD import kd_loss

__all__ = ["VRM", "VRMOneView", "edge_uncertainty", "vrm_loss"]

DEFAULTS = {
    "ALPHA": weight(128.0, "of the inter-sample relations"),
    "BETA": weight(32.0, "of the inter-class relations"),
    "VERTEX_WEIGHT": weight(0.0, "of the vertices themselves"),
    "CE_WEIGHT": weight(1.0, "of the real view's cross-entropy"),
    "CE_VIRTUAL_WEIGHT": weight(1.0, "of the virtual view's cross-entropy"),
    "WARMUP": Option(0, "epochs in which ALPHA and BETA rise linearly", at_least=0, at_most=MANY),
    "LOCATION": Option("logits", "outputs that are the vertices", one_of=("logits", "pooled")),
    "TEMPERATURE": Option(4.0, "temperature of the predictions", above=0),
    "ZSNORM": Option(True, "standardise the logits first"),
    "ADAPTOR": Option("residual", "module on the student's vertices", one_of=("residual", "mlp", "none")),
    "GRAPH": Option("virtual", "edges from real to virtual views; raw: between all views", one_of=("virtual", "raw")),
    "RELATION": Option("difference", "relation of two vertices", one_of=graphs.RELATIONS),
    "EDGE_NORM": Option(True, "edges have length 1"),
    "METRIC": Option("mse", "distance of student's and teacher's relations", one_of=graphs.METRICS),
    "HUBER_DELTA": Option(1.0, "METRIC huber is linear above this difference", above=0),
    "REDUCTION": Option("element", "mean over the entries of edges, or over edges", one_of=("element", "edge")),
    "PRUNE_PERCENTILE": Option(
        95.0, "edges with an uncertainty above this percentile are dropped", at_least=0, at_most=100
    ),
    "UNCERTAINTY": Option(
        "cross", "uncertainty of an edge: cross entropy, or entropy of the mixture", one_of=("cross", "mixture")
    ),
    "UNCERTAINTY_OF": Option(
        "vertices", "uncertainties of the vertices, or of softmax(logits)", one_of=("vertices", "predictions")
    ),
    "ICV_NORMALIZE": Option(True, "normalise columns to sum 1 for uncertainties between classes"),
    "EDGE_EPS": Option(1e-3, "shorter edges, as a share of the mean length, are dropped", at_least=0),
    "JOINT_FORWARD": Option(False, "both views go through the student in one batch"),
}
PAPER = "Zhang et al., VRM: Knowledge Distillation via Virtual Relation Matching, ICCV 2025"


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
    """``mean ||e_s - e_t||^2 / D`` over the kept edges of the inter-sample and of the inter-class graph (Eq. 1 to 3).

    An edge is ``e = (x - y) / ||x - y||``, x a vertex of the real view, y of the virtual view. Vertices are the rows of
    the probabilities, D = C (inter-sample), or the columns, D = B (inter-class). Options change this default formula.

    An edge is kept if the student's uncertainty of it is at most the percentile of its graph (Eq. 2), and if in both
    networks its length is at least ``edge_eps`` times its graph's mean length. Without kept edges the loss is zero. See
    :func:`~mdistiller.functional.graphs.compare_graphs` for the cost. Second derivatives are not supported. Plain form:
    tests/oracles/vrm.py.

    Args:
        p_real_s: ``(B, C)`` the student's class probabilities for the real views; gradient flows.
        p_virtual_s: ``(B, C)`` the student's for the virtual views; gradient flows.
        p_real_t: ``(B, C)`` the teacher's for the real views; constant.
        p_virtual_t: ``(B, C)`` the teacher's for the virtual views; constant.
        prune_percentile: in [0, 100]; see :class:`~mdistiller.functional.graphs.Rules` for this and the other options.
        metric: ``"mse"``, ``"l1"``, ``"huber"`` or ``"cosine"``.
        reduction: ``"element"``, ``"edge"`` or ``"sum"``.
        uncertainty: ``"cross"``, ``"mixture"`` or ``"sum"``, see :func:`edge_uncertainty`.
        edge_eps: share of the mean length; 0 drops no edge for its length.
        huber_delta: Huber's loss is half the square below this difference and linear above.

    Returns:
        The inter-sample and the inter-class loss, each ``()`` and unweighted, in float32 or better.

    Raises:
        InputError: an unknown name, a value out of range, or shapes that differ.

    Example:
        >>> real, virtual = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
        >>> vrm_loss(real, virtual, virtual, real)
        (tensor(1.3333), tensor(1.3333))
    """
    inputs = (p_real_s, p_virtual_s, p_real_t, p_virtual_t)
    if p_real_s.ndim != 2 or any(p.shape != p_real_s.shape for p in inputs):
        raise InputError(f"vrm_loss takes four tensors of one shape (B, C), got {[tuple(p.shape) for p in inputs]}")
    rules = Rules(prune_percentile, metric, reduction, uncertainty, edge_eps, huber_delta)
    with torch.autocast(p_real_s.device.type, enabled=False):
        student, teacher = stack_views(inputs[:2]), stack_views(inputs[2:])
        losses = compare_samples(student, teacher, rules).loss, compare_classes(student, teacher, rules).loss
    dtype = at_least_float32(p_real_s).dtype
    return losses[0].to(dtype), losses[1].to(dtype)


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """Real and virtual vertices ``(B, D)`` as ``(2, B, D)``, in the working precision of graphs."""
    return in_working_precision(torch.stack(tuple(views)))


def compare_samples(student: Tensor, teacher: Tensor, rules: Rules, beliefs: Tensor | None = None) -> Comparison:
    """The inter-sample graphs of vertices ``(2, B, D)``; ``beliefs`` default to the student's vertices."""
    return compare_graphs(student, teacher, student if beliefs is None else beliefs, rules)


def compare_classes(
    student: Tensor, teacher: Tensor, rules: Rules, beliefs: Tensor | None = None, normalize: bool = True
) -> Comparison:
    """The inter-class graphs. Vertices are the columns; ``normalize`` is ``ICV_NORMALIZE``."""
    shares = (student if beliefs is None else beliefs).detach().mT
    if normalize:
        shares = shares / shares.sum(2, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    return compare_graphs(student.mT, teacher.mT, shares, rules)


class Adaptor(nn.Module):
    """MLP on the student's logits or features, ``(B, D)`` to ``(B, D')``.

    Args:
        width: D.
        out_width: D', also the hidden width.
        residual: add the input to the output (through a linear map if D' differs from D). The output weights start at
            zero, so the module starts as the identity. Without the skip the ReLU prevents such a start, and the first
            gradients are unrelated to the logits' gradients.
    """

    def __init__(self, width: int, out_width: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.ReLU(), nn.Linear(out_width, out_width))
        if residual:
            self.skip = nn.Identity() if width == out_width else nn.Linear(width, out_width, bias=False)
            nn.init.zeros_(self.mlp[2].weight)
            nn.init.zeros_(self.mlp[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.mlp(x) if self.residual else self.mlp(x)


@register_distiller("VRM", DEFAULTS, paper=PAPER, family="relation")
class VRM(Distiller):
    """Relations between images and between classes, across a real and a virtual (strong) view.

    The weak view is the paper's real view, the strong view its virtual view. The frozen teacher takes both in one
    batch. Relations and vertices of weight 0 are not computed.
    """

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg.VRM
        if own.VERTEX_WEIGHT and own.LOCATION != "logits":
            raise InputError(
                f"VRM.VERTEX_WEIGHT compares predictions, but VRM.LOCATION is {own.LOCATION}; set the weight to 0 or "
                "the location to logits"
            )
        if own.UNCERTAINTY_OF == "predictions" and own.LOCATION != "logits":
            raise InputError(
                "VRM.UNCERTAINTY_OF predictions is of the logits that the vertices are made of, but VRM.LOCATION is "
                f"{own.LOCATION}; set UNCERTAINTY_OF vertices or the location to logits"
            )
        try:
            self.rules = Rules(**{field.name: own[field.name.upper()] for field in fields(Rules)})
        except InputError as error:
            raise InputError(f"VRM.{error}") from error
        self.alpha, self.beta, self.vertex_weight = own.ALPHA, own.BETA, own.VERTEX_WEIGHT
        self.ce_weight, self.ce_virtual_weight = own.CE_WEIGHT, own.CE_VIRTUAL_WEIGHT
        self.warmup = own.WARMUP
        self.on_logits = own.LOCATION == "logits"
        self.temperature = own.TEMPERATURE
        self.zsnorm = own.ZSNORM
        self.raw_graph = own.GRAPH == "raw"
        self.icv_normalize = own.ICV_NORMALIZE
        self.plain_beliefs = own.UNCERTAINTY_OF == "predictions"
        self.joint_forward = own.JOINT_FORWARD
        facts = self.network_facts(cfg)
        widths = [of_network.classes if self.on_logits else of_network.need("pooled_width") for of_network in facts]
        if self.zsnorm and widths[0] <= 2:
            raise InputError(
                f"VRM.ZSNORM: with {widths[0]} classes ZSNorm keeps only the order of the classes; set VRM.ZSNORM False"
            )
        compares = bool(self.alpha or self.beta or self.vertex_weight)  # else nothing would train an adaptor
        self.adaptor = make_adaptor(own.ADAPTOR, *widths) if compares else nn.Identity()

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        both_views = torch.cat([image_weak, image_strong])
        if self.joint_forward:
            (real, virtual), student = (x.chunk(2) for x in self._read(self.student, both_views))
        else:
            views = [self._read(self.student, image) for image in (image_weak, image_strong)]
            (real, virtual), student = zip(*views, strict=True)
        with torch.no_grad():
            teacher = self._read(self.teacher, both_views)[1].chunk(2)
        return real, {
            "loss_ce": self.ce_weight * F.cross_entropy(real, target),
            "loss_ce_virtual": self.ce_virtual_weight * F.cross_entropy(virtual, target),
            **self.relation_losses(student, teacher, epoch),
        }

    def _read(self, network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the tensor that the vertices are computed from."""
        logits, features = network(image)
        return logits, logits if self.on_logits else features["pooled_feat"]

    def relation_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor], epoch: int) -> dict[str, Tensor]:
        """All losses but the cross-entropies, weighted.

        Args:
            student: logits ``(B, C)`` or features ``(B, D)`` for each view, one or two.
            teacher: the teacher's.
            epoch: from 1.
        """
        losses: dict[str, Tensor] = {}
        self.monitors = {}
        with torch.autocast(student[0].device.type, enabled=False):
            plain = [at_least_float32(z.detach()).softmax(1) for z in student] if self.plain_beliefs else None
            student = [self._normalise(self.adaptor(at_least_float32(z))) for z in student]
            teacher = [self._normalise(at_least_float32(z)) for z in teacher]
            if self.vertex_weight:
                distances = [kd_loss(s, t, self.temperature) for s, t in zip(student, teacher, strict=True)]
                losses["loss_vertices"] = self.vertex_weight * sum(distances)
            if self.alpha or self.beta:
                both = [self._graph(self._vertices(views)) for views in (student, teacher)]
                if plain is None and self.on_logits:
                    beliefs = both[0]
                else:
                    beliefs = self._graph(plain or [self._predict(z) for z in student])
            rise = warmup(epoch, self.warmup)
            if self.alpha:
                found = compare_samples(*both, self.rules, beliefs)
                losses["loss_isv"] = rise * self.alpha * found.loss.to(student[0].dtype)
                self._watch("isv", found)
            if self.beta:
                found = compare_classes(*both, self.rules, beliefs, self.icv_normalize)
                losses["loss_icv"] = rise * self.beta * found.loss.to(student[0].dtype)
                self._watch("icv", found)
        return losses

    def _normalise(self, x: Tensor) -> Tensor:
        return zs_norm(x) if self.zsnorm else x

    def _predict(self, normalised: Tensor) -> Tensor:
        return F.softmax(normalised / self.temperature, dim=1)

    def _vertices(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._predict(z) for z in views] if self.on_logits else views

    def _graph(self, views: Sequence[Tensor]) -> Tensor:
        """A tensor of the vertices at both ends of the edges, ``(2, N, D)``: the two views, or all views twice."""
        if self.raw_graph or len(views) == 1:
            views = 2 * [torch.cat(tuple(views))]
        return stack_views(views)

    def _watch(self, name: str, found: Comparison) -> None:
        self.monitors |= {f"kept_{name}": found.kept, f"uncertainty_{name}": found.uncertainty}


@register_distiller("VRM_ONE_VIEW", DEFAULTS, section="VRM", paper=PAPER, family="relation")
class VRMOneView(VRM):
    """VRM on one weak view, without virtual ones: relations within it (Tab. 4's first rows).

    The paper has no pruning here: set ``VRM.PRUNE_PERCENTILE 100``. ``VRM.BETA 0`` leaves the relations between
    samples.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        for key, value in (("GRAPH", "virtual"), ("JOINT_FORWARD", False)):
            if cfg.VRM[key] != value:
                raise InputError(
                    f"VRM.{key} {cfg.VRM[key]} needs two views, and VRM_ONE_VIEW has one; leave it at {value}, or "
                    "set DISTILLER.TYPE VRM"
                )

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, student = self._read(self.student, image)
        with torch.no_grad():
            _, teacher = self._read(self.teacher, image)
        return logits, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits, target),
            **self.relation_losses([student], [teacher], epoch),
        }


def make_adaptor(kind: str, width: int, out_width: int) -> nn.Module:
    """The module of ``VRM.ADAPTOR``, with weights from torch's generator. The generator's state is restored.

    Args:
        kind: ``"residual"``, ``"mlp"`` or ``"none"``.
        width: entries of the student's vertices.
        out_width: entries of the teacher's vertices.

    Raises:
        InputError: ``kind`` is ``"none"`` and the widths differ.
    """
    if kind == "none":
        if width != out_width:
            raise InputError(
                f"VRM.ADAPTOR none: the student's features have {width} entries, the teacher's {out_width}; set "
                "VRM.ADAPTOR residual or mlp"
            )
        return nn.Identity()
    with generator_kept():
        return Adaptor(width, out_width, residual=kind == "residual")
