"""DIST and DIST+: match how predictions relate to each other, not their values.

Huang, You, Wang, Qian, Xu. Knowledge Distillation from A Stronger Teacher. NeurIPS 2022, arXiv:2205.10536. Its journal
version contains DIST+; equations, sections and tables are the journal version's. Shapes: B images, C classes, D
channels.

With ``p = softmax(z / TAU)`` ``(B, C)`` and ``d_p = 1 - Pearson's correlation`` (Eq. 6): ``L_inter`` is the mean of
``d_p`` over rows (Eq. 8), ``L_intra`` over columns (Eq. 9), and DIST minimises ``CE + 2 L_inter + 2 L_intra`` (Eq. 10).
DIST+ adds the same distance of the last feature maps along channels (``L_cr``, Eq. 15) and over positions (``L_sr``,
Eq. 16). DIST+ also *acclimates* the teacher: its last convolution and its classifier learn from the student's
non-target classes (``L_ta``, Eq. 14). One forward pass of the teacher serves both.

From the authors' code for DIST, and not in the paper: the factor ``TAU ** 2`` on both terms (``TAU_SQUARED``), and
``EPS``, added to the product of two vectors' norms. Added here: a vector that is constant up to rounding has no
correlation; its distance is 1, without gradient. With ``EPS`` alone its gradient would be huge.

The paper leaves open the following points. These are our readings:

- a column holds the images of the process's own batch, as in the authors' code. ``GATHER``: the images of all
  processes, with gradient. ``COLUMN_GROUP`` n: n images, one group after the other. This equals several devices with n
  images each (the authors' ImageNet: 8 devices with 32 each);
- ``RELATION`` kl (Tab. 9): with rows only it is KD. Columns are not normalised to sum 1;
- ``L_ta`` has the student's ``TAU`` and ``EPS``, but not the factor ``TAU ** 2``. With mixed labels ``(B, C)`` the
  target is the likeliest class. Its rows are normalised to sum 1, which changes the influence of ``EPS`` only: without
  it, rows are tiny if both networks are sure of the target, and ``EPS`` would suppress the loss (at a probability of
  0.9999, 100 classes and ``TAU`` 1, to a few per cent);
- ``ACCLIMATE_MODULES``: by default the ``nn.Conv2d`` that the teacher calls last, and its classifier. BatchNorm's scale
  and shift in these modules are not trained;
- ``ACCLIMATE_LR``: a hundredth of the student's rate, on the same schedule. There is no weight decay: it would erode
  the teacher where the loss has no gradient;
- ``ACCLIMATE_RADIUS``: no part of ``L_ta`` holds the teacher near its start. The further the teacher moves, the more it
  forgets, so the rate and the number of steps would decide the result. Each weight tensor therefore stays within this
  share of its own length around its start. Before a step, a tensor outside this ball is projected to its surface;
- ``ACCLIMATE`` kl (Tab. 15): over all classes, with the student as the target; ``all``: Pearson over all classes;
- the map "used for distillation" is the last one, after its activation. The student's map passes a 1x1 convolution with
  bias and without normalisation, even for equal widths. The larger of two maps is pooled to the smaller size;
- ``FEATURE_RELATION`` mse (Tab. 14): over all entries for ``L_cr``, over the channels' means for ``L_sr``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_one_shape, require_same_images, same_size
from mdistiller.functional.gather import gather_with_gradient
from mdistiller.functional.mixing import class_numbers
from mdistiller.options import Option, are_texts, weight
from mdistiller.registry import InputError, check_choice

from ._base import Distiller, register_distiller
from ._common import generator_kept

RELATIONS = ("pearson", "cosine", "kl")
FEATURE_RELATIONS = ("pearson", "cosine", "mse")
ACCLIMATIONS = ("nontarget", "all", "kl", "none")
EPS = 1e-8
NOISE = 16  # a vector that varies by less than this many roundings of its largest entry is constant

DEFAULTS = {
    "TAU": Option(4.0, "temperature; the paper: 4 on CIFAR-100, 1 on ImageNet", above=0),
    "TAU_SQUARED": Option(True, "multiply both terms by TAU ** 2"),
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
    "INTER_WEIGHT": weight(2.0, "of L_inter"),
    "INTRA_WEIGHT": weight(2.0, "of L_intra"),
    "RELATION": Option("pearson", "distance of rows and of columns", one_of=RELATIONS),
    "EPS": Option(EPS, "added to the product of two vectors' norms", at_least=0),
    "GATHER": Option(False, "columns hold the images of all processes"),
    "COLUMN_GROUP": Option(
        0, "images in a column of L_intra: consecutive groups of a batch; 0: the whole batch", at_least=0
    ),
}
PLUS_DEFAULTS = {
    **DEFAULTS,
    "CHANNEL_WEIGHT": weight(1.0, "of L_cr"),
    "SPATIAL_WEIGHT": weight(1.0, "of L_sr"),
    "FEATURE_RELATION": Option("pearson", "distance of the feature maps", one_of=FEATURE_RELATIONS),
    "ACCLIMATE": Option("nontarget", "the teacher's loss; none: the teacher stays frozen", one_of=ACCLIMATIONS),
    "ACCLIMATE_WEIGHT": weight(1.0, "of L_ta"),
    "ACCLIMATE_LR": Option(0.0, "the teacher's learning rate; 0: a hundredth of SOLVER.LR", at_least=0),
    "ACCLIMATE_RADIUS": Option(
        0.02, "largest distance of a weight from its start, as a share of its length; 0: no bound", at_least=0
    ),
    "ACCLIMATE_MODULES": Option(
        [], "trained modules of the teacher; empty: its last convolution and its classifier", holds=(are_texts, "names")
    ),
}
PAPER = "Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536"
PLUS_PAPER = "Huang et al., DIST+: Knowledge Distillation from A Stronger Adaptive Teacher"


def pearson_distance(a: Tensor, b: Tensor, dim: int = -1, eps: float = EPS) -> Tensor:
    """``1 - cov(a, b) / (std(a) std(b))`` of the vectors along ``dim`` (Eq. 6, 7); in [0, 2].

    A positive scale or a shift of either vector changes nothing, except through ``eps``.

    Args:
        a: any shape; gradient flows.
        b: the shape of ``a``; gradient flows.
        dim: the axis of the vectors. The result lacks this axis.
        eps: added to the product of the norms of the centred vectors, as in the authors' code. It suppresses vectors
            with a tiny spread, such as columns of classes that are absent from a batch.

    Returns:
        The shape of ``a`` without ``dim``, in float32 or better. A constant vector gives 1, without gradient.

    Raises:
        InputError: different shapes.

    Example:
        >>> a = torch.tensor([-1.0, 0.0, 1.0])
        >>> pearson_distance(a, 2 * a + 3), pearson_distance(a, -a)
        (tensor(-1.1921e-07), tensor(2.))
    """
    require_one_shape("pearson_distance", a, b)
    return _angular_distance(_centred(at_least_float32(a), dim), _centred(at_least_float32(b), dim), dim, eps)


def cosine_distance(a: Tensor, b: Tensor, dim: int = -1, eps: float = EPS) -> Tensor:
    """``1 - <a, b> / (||a|| ||b||)`` of the vectors along ``dim``. A zero vector gives 1, without gradient.

    This is the ablation of :func:`pearson_distance` in Tab. 11; it has the same arguments. A positive scale of either
    vector changes nothing; a shift does.

    Example:
        >>> cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.)
    """
    require_one_shape("cosine_distance", a, b)
    a, b = at_least_float32(a), at_least_float32(b)
    return _angular_distance(_silenced(a, a, dim), _silenced(b, b, dim), dim, eps)


def dist_loss(
    logits_s: Tensor,
    logits_t: Tensor,
    tau: float,
    relation: str = "pearson",
    eps: float = EPS,
    column_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """``L_inter = mean over rows of d_p``, ``L_intra = mean over columns of d_p`` (Eq. 8, 9), without ``tau^2``.

    d_p is the :func:`pearson_distance` of ``softmax(z_s / tau)`` and ``softmax(z_t / tau)``.

    Args:
        logits_s: ``(B, C)`` raw scores, or ``(B, C, ...)`` with every position a sample; gradient flows.
        logits_t: the teacher's, of the same shape; constant.
        tau: temperature above 0.
        relation: ``"pearson"``; ``"cosine"``; ``"kl"``: KL(teacher || student).
        eps: see :func:`pearson_distance`.
        column_group: length of a column. The samples form groups of this size in their order, the last group may be
            smaller, and L_intra is the mean over the groups. 0: all samples are one column.

    Returns:
        Two scalars ``()`` in float32 or better. Equal logits give 0, up to ``eps``.

    Raises:
        InputError: logits of different shapes, or an unknown relation.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.eye(3)[[0, 2]]
        >>> dist_loss(student, teacher, tau=1.0)
        (tensor(0.7500), tensor(0.6667))
    """
    require_one_shape("dist_loss", logits_s, logits_t)
    z_s, z_t = (_samples(at_least_float32(z)) / tau for z in (logits_s, logits_t.detach()))
    length = column_group or len(z_s)
    if relation == "kl":
        total = F.kl_div(z_s.log_softmax(1), z_t.log_softmax(1), reduction="sum", log_target=True)
        return total / z_s.shape[0], total / (z_s.shape[1] * -(-len(z_s) // length))
    distance = pearson_distance if check_choice("relation", relation, RELATIONS) == "pearson" else cosine_distance
    p_s, p_t = z_s.softmax(1), z_t.softmax(1)
    columns = [distance(s, t, 0, eps).mean() for s, t in zip(p_s.split(length), p_t.split(length), strict=True)]
    return distance(p_s, p_t, 1, eps).mean(), torch.stack(columns).mean()


def acclimation_loss(
    logits_s: Tensor, logits_t: Tensor, target: Tensor, tau: float = 1.0, kind: str = "nontarget", eps: float = EPS
) -> Tensor:
    """``mean over samples of d_p(softmax(z_t / tau), softmax(z_s / tau))`` over the non-target classes (Eq. 14).

    The teacher learns this loss from the student. d_p is the :func:`pearson_distance`.

    Args:
        logits_s: ``(B, C)`` raw scores; constant.
        logits_t: ``(B, C)`` raw scores; gradient flows.
        target: ``(B,)`` class numbers, or ``(B, C)`` shares of mixed labels; the largest share counts.
        tau: temperature above 0.
        kind: ``"nontarget"``: the softmax runs over all classes but the target, whose logit has no effect and no
            gradient; ``"all"``: all classes; ``"kl"``: KL(student || teacher) over all classes.
        eps: see :func:`pearson_distance`.

    Returns:
        Scalar ``()`` in float32 or better. With two classes there is one non-target class and no correlation: the loss
        is 1, without gradient.

    Raises:
        InputError: logits of different shapes, a different number of targets, or an unknown kind.

    Example:
        >>> student, teacher = torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[9.0, 0.0, 1.0]])
        >>> acclimation_loss(student, teacher, torch.tensor([0]))
        tensor(2.)
    """
    require_one_shape("acclimation_loss", logits_s, logits_t)
    require_same_images("acclimation_loss", logits_s, target)
    z_s, z_t = at_least_float32(logits_s.detach()) / tau, at_least_float32(logits_t) / tau
    if kind == "kl":
        return F.kl_div(z_t.log_softmax(1), z_s.log_softmax(1), reduction="batchmean", log_target=True)
    if check_choice("kind", kind, ACCLIMATIONS[:2]) == "nontarget":
        target = class_numbers(target)
        columns = torch.arange(z_s.shape[1] - 1, device=target.device)
        others = columns + (columns >= target[:, None]).long()
        z_s, z_t = z_s.gather(1, others), z_t.gather(1, others)
    return pearson_distance(z_s.softmax(1), z_t.softmax(1), 1, eps).mean()


def feature_relation_loss(
    f_s: Tensor, f_t: Tensor, relation: str = "pearson", eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """``L_cr = mean d_p(f_s, f_t)``, ``L_sr = mean d_p(sum over D of f_s, sum over D of f_t)`` (Eq. 15, 16).

    d_p is the :func:`pearson_distance`: for L_cr of the D channels, mean over images and positions; for L_sr of the H W
    positions, mean over images. ``"mse"`` averages over channels instead of the sum. Plain form: tests/oracles/dist.py.

    Args:
        f_s: ``(B, D, H, W)`` the student's maps, aligned to the teacher's width; gradient flows, first derivative only.
        f_t: ``(B, D, H, W)`` the teacher's maps; constant.
        relation: ``"pearson"``, ``"cosine"`` or ``"mse"``.
        eps: see :func:`pearson_distance`.

    Returns:
        Two scalars ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes, or an unknown relation.

    Example:
        >>> f_s, f_t = torch.arange(12.0).view(1, 3, 2, 2), torch.arange(12.0).square().view(1, 3, 2, 2)
        >>> feature_relation_loss(f_s, f_t)
        (tensor(0.0241), tensor(0.0033))
    """
    require_one_shape("feature_relation_loss", f_s, f_t)
    if check_choice("relation", relation, FEATURE_RELATIONS) == "pearson":
        channel, *means = _ChannelRelation.apply(f_s, f_t, eps)
        sums = (f_s.shape[1] * mean.flatten(1) for mean in means)
        return channel.mean(), pearson_distance(*sums, 1, eps).mean()
    f_s, f_t = at_least_float32(f_s), at_least_float32(f_t.detach())
    if relation == "mse":
        return F.mse_loss(f_s, f_t), F.mse_loss(f_s.mean(1), f_t.mean(1))
    channel = cosine_distance(f_s, f_t, 1, eps)
    return channel.mean(), cosine_distance(f_s.sum(1).flatten(1), f_t.sum(1).flatten(1), 1, eps).mean()


def channel_relation_loss(f_s: Tensor, f_t: Tensor, relation: str = "pearson", eps: float = EPS) -> Tensor:
    """``L_cr`` (Eq. 15), the first loss of :func:`feature_relation_loss`, ``()``.

    Example:
        >>> f_s, f_t = torch.arange(12.0).view(1, 3, 2, 2), torch.arange(12.0).square().view(1, 3, 2, 2)
        >>> channel_relation_loss(f_s, f_t)
        tensor(0.0241)
    """
    return feature_relation_loss(f_s, f_t, relation, eps)[0]


def spatial_relation_loss(f_s: Tensor, f_t: Tensor, relation: str = "pearson", eps: float = EPS) -> Tensor:
    """``L_sr`` (Eq. 16), the second loss of :func:`feature_relation_loss`, ``()``.

    Example:
        >>> f_s, f_t = torch.arange(12.0).view(1, 3, 2, 2), torch.arange(12.0).square().view(1, 3, 2, 2)
        >>> spatial_relation_loss(f_s, f_t)
        tensor(0.0033)
    """
    return feature_relation_loss(f_s, f_t, relation, eps)[1]


class _ChannelRelation(torch.autograd.Function):
    """``pearson_distance(f_s, f_t, 1, eps)`` and both means over channels, each ``(B, H, W)``.

    With ``x``, ``y`` standardised along channels, ``r = mean(x y)`` and ``n`` the product of the centred vectors'
    norms, the correlation is ``rho = r n / (n + eps)``, and its derivative by ``f_s`` is ``std_t (y - rho x) / (n +
    eps)``. This takes a third of the plain form's time, since the plain form reads the maps many more times. Channels
    are the last axis here; with ``channels_last`` this is the maps' memory layout.
    """

    @staticmethod
    def forward(ctx: Any, f_s: Tensor, f_t: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mean_s, std_s, constant_s = _standardised(f_s)
        y, mean_t, std_t, constant_t = _standardised(f_t)
        norms = x.shape[-1] * std_s * std_t
        rho = (x * y).mean(-1, keepdim=True) * (norms / (norms + eps))
        constant = constant_s | constant_t
        rho, slope = (z.masked_fill(constant, 0) for z in (rho, std_t / (norms + eps)))
        ctx.save_for_backward(x, y, rho, slope)
        ctx.dtype = f_s.dtype
        mean_s, mean_t = mean_s.squeeze(-1), mean_t.squeeze(-1)
        ctx.mark_non_differentiable(mean_t)
        return 1 - rho.squeeze(-1), mean_s, mean_t

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_distance: Tensor, by_mean: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        x, y, rho, slope = ctx.saved_tensors
        slope = by_distance[..., None] * slope
        gradient = torch.addcmul(by_mean[..., None] / x.shape[-1], x, rho * slope).addcmul_(y, slope, value=-1)
        return gradient.to(ctx.dtype).movedim(-1, 1), None, None


def _standardised(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(B, D, H, W)`` as ``(B, H, W, D)`` of mean 0, variance 1; mean; deviation; mask of constants.

    A vector is constant if it deviates by less than ``NOISE`` roundings of its mean, or by about ``tiny ** 0.5``, which
    keeps the inverse finite.
    """
    f = at_least_float32(f.movedim(1, -1)).contiguous()
    limits = torch.finfo(f.dtype)
    x, mean, inverse = torch.native_layer_norm(f, f.shape[-1:], None, None, limits.tiny)
    std = 1 / inverse
    return x, mean, std, std <= NOISE * limits.eps * mean.abs() + 2 * limits.tiny**0.5


@torch.no_grad()
def hold_within(parameter: Tensor, start: Tensor, radius: float) -> None:
    """Take ``parameter`` back to the distance ``radius * ||start||`` from ``start`` if it lies beyond."""
    way = parameter - start
    length, limit = way.norm(), radius * start.norm()
    parameter.copy_(torch.where(length > limit, start + way * (limit / length), parameter))


def _samples(logits: Tensor) -> Tensor:
    """``(B, C, ...)`` to ``(N, C)``."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def _centred(x: Tensor, dim: int) -> Tensor:
    return _silenced(x - x.mean(dim, keepdim=True), x, dim)


def _silenced(x: Tensor, reference: Tensor, dim: int) -> Tensor:
    """``x``, with zeros without gradient for vectors that are rounding errors of those in ``reference``."""
    largest, scale = (y.detach().abs().amax(dim, keepdim=True) for y in (x, reference))
    return torch.where(largest > NOISE * torch.finfo(x.dtype).eps * scale, x, 0.0)


def _angular_distance(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    norms = a.norm(dim=dim) * b.norm(dim=dim) + eps
    return 1 - (a * b).sum(dim) / norms.clamp(min=torch.finfo(a.dtype).tiny)


@register_distiller("DIST", DEFAULTS, paper=PAPER, family="relation")
class DIST(Distiller):
    """Pearson correlation of predictions between classes and within classes (:func:`dist_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        own = cfg[self.section]
        self.tau, self.eps = own.TAU, own.EPS
        self.relation, self.gather, self.column_group = own.RELATION, own.GATHER, own.COLUMN_GROUP
        self.ce_weight, self.inter_weight, self.intra_weight = own.CE_WEIGHT, own.INTER_WEIGHT, own.INTRA_WEIGHT
        self.factor = self.tau**2 if own.TAU_SQUARED else 1.0

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        return logits_student, self.logit_losses(logits_student, logits_teacher, target)

    def logit_losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted terms on the logits."""
        ce = F.cross_entropy(logits_student, target)
        logits = logits_student, logits_teacher.detach()
        if self.gather:
            logits = tuple(gather_with_gradient(z) for z in logits)
        inter, intra = dist_loss(*logits, self.tau, self.relation, self.eps, self.column_group)
        return {
            "loss_ce": self.ce_weight * ce,
            "loss_inter": self.inter_weight * self.factor * inter,
            "loss_intra": self.intra_weight * self.factor * intra,
        }


@register_distiller("DIST_PLUS", PLUS_DEFAULTS, paper=PLUS_PAPER, family="relation")
class DISTPlus(DIST):
    """DIST plus Pearson correlation of feature maps over channels and positions; the teacher's last layers are trained.

    The teacher stays in eval mode. Autograd sees the acclimated parameters only, so the forward pass of the teacher's
    other layers stores nothing for a backward pass.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        own = cfg.DIST_PLUS
        self.channel_weight, self.spatial_weight = own.CHANNEL_WEIGHT, own.SPATIAL_WEIGHT
        self.acclimate_weight = own.ACCLIMATE_WEIGHT
        self.feature_relation, self.acclimate = own.FEATURE_RELATION, own.ACCLIMATE
        uses_maps = bool(self.channel_weight or self.spatial_weight)
        if self.feature_relation != "pearson" and not uses_maps:
            raise InputError(
                f"DIST_PLUS.FEATURE_RELATION {self.feature_relation} has no effect: CHANNEL_WEIGHT and "
                "SPATIAL_WEIGHT are both 0"
            )
        self.acclimated = self._find_acclimated(cfg)
        self.radius = own.ACCLIMATE_RADIUS
        for number, parameter in enumerate(self.acclimated):
            parameter.requires_grad_(True)
            # Follows from the teacher's file: not saved.
            self.register_buffer(f"start_{number}", parameter.detach().clone(), persistent=False)
        self.align = None
        if uses_maps:
            width_s, width_t = (facts.channels[-1] for facts in self.network_facts(cfg))
            with generator_kept():
                self.align = nn.Conv2d(width_s, width_t, 1)

    def _find_acclimated(self, cfg: Any) -> list[nn.Parameter]:
        """The teacher's parameters that move."""
        own = cfg.DIST_PLUS
        names = list(own.ACCLIMATE_MODULES)
        if self.acclimate == "none":
            if names or own.ACCLIMATE_LR:
                raise InputError(
                    "DIST_PLUS.ACCLIMATE none does not train the teacher, so ACCLIMATE_MODULES must be empty and "
                    f"ACCLIMATE_LR 0; got {names} and {own.ACCLIMATE_LR}"
                )
            return []
        _, of_teacher = self.network_facts(cfg)
        if not names:
            try:
                names = [of_teacher.need("last_convolution"), of_teacher.need("classifier")]
            except InputError as error:
                raise InputError(f"{error}; name the modules to train: DIST_PLUS.ACCLIMATE_MODULES") from None
        if self.acclimate == "nontarget" and of_teacher.classes <= 2:
            raise InputError(
                "DIST_PLUS.ACCLIMATE nontarget needs at least three classes: two leave one value, without correlation; "
                "set DIST_PLUS.ACCLIMATE none"
            )
        found = {}  # modules may contain each other
        for module in _modules_named(self.teacher, names):
            for part in module.modules():
                if not isinstance(part, nn.modules.batchnorm._BatchNorm):
                    found.update({id(p): p for p in part.parameters(recurse=False)})
        if not found:
            raise InputError(
                f"DIST_PLUS.ACCLIMATE_MODULES: {names} have only BatchNorm's parameters, which are not trained"
            )
        return list(found.values())

    def teacher_parameters(self) -> list[nn.Parameter]:
        return list(self.acclimated)

    def parameter_groups(self, cfg: Any) -> list[dict[str, Any]]:
        """The student's parameters as usual; the teacher's with their own rate and no weight decay."""
        moving = {id(p) for p in self.acclimated}
        groups = [{"params": [p for p in self.get_learnable_parameters() if id(p) not in moving]}]
        if self.acclimated:
            rate = cfg.DIST_PLUS.ACCLIMATE_LR or 0.01 * cfg.SOLVER.LR
            groups.append({"params": self.teacher_parameters(), "lr": rate, "weight_decay": 0.0})
        return groups

    @torch.no_grad()
    def hold_teacher(self) -> None:
        """Take weights beyond ``ACCLIMATE_RADIUS`` back to that distance from their start."""
        for number, parameter in enumerate(self.acclimated if self.radius else ()):
            hold_within(parameter, self.get_buffer(f"start_{number}"), self.radius)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.hold_teacher()
        logits_student, features_student = self.student(image)
        logits_teacher, features_teacher = self.teacher(image)
        losses = self.logit_losses(logits_student, logits_teacher, target)
        if self.align is not None:
            f_s, f_t = same_size(features_student["feats"][-1], features_teacher["feats"][-1].detach())
            channel, spatial = feature_relation_loss(self.align(f_s), f_t, self.feature_relation, self.eps)
            losses["loss_channel"] = self.channel_weight * channel
            losses["loss_spatial"] = self.spatial_weight * spatial
        if self.acclimate != "none":
            acclimation = acclimation_loss(logits_student, logits_teacher, target, self.tau, self.acclimate, self.eps)
            losses["loss_acclimation"] = self.acclimate_weight * acclimation
        return logits_student, losses


def _modules_named(network: nn.Module, names: list[str]) -> list[nn.Module]:
    modules = dict(network.named_modules())
    return [modules[check_choice("DIST_PLUS.ACCLIMATE_MODULES", name, tuple(modules))] for name in names]
