"""MDR: match relations between images at the stage where the teacher separates the images best.

MDR: Multi-stage Decoupled Relational Knowledge Distillation with Adaptive Stage Selection. Equations, sections,
figures and tables are the paper's. Shapes: N anchors, M = 3N positives, K stages, D entries of an embedding, C classes.

A self-supervised module (SM: pooling and two linear layers) after each stage of both networks embeds the images. The
teacher's SMs are trained first, on the frozen teacher (:meth:`MDR.prepare`). The student's SMs are trained with the
student. With ``z`` the embedding of an anchor and ``z~`` of a positive, an augmented anchor, the relations are

- angle: ``A[i, j] = cos(z~_i, z_j)`` (Eq. 4). The loss is the KL divergence of ``softmax(A / TEMPERATURE)`` (Eq. 12);
- length: ``Dif[i, j] = | ||z~_i|| - ||z_j|| | / mu`` (Eq. 9, 10). The loss is the squared difference (Eq. 11).

Each positive uses the stage in which its own anchor has the best rank among the anchors. Angles and lengths choose
their stages independently (Eq. 8). Ranks are used because the similarities of the stages differ in scale.

``L = CE(anchors) + 2 KD + 300 L_angle + L_length`` (Eq. 13). Anchors and positives form one batch of the networks, so
BatchNorm sees both. Terms of weight 0 are not computed. If only the cross-entropy remains, there are no positives.

The paper leaves open the following points. These are our readings, most of them with a key:

- ``STAGES``: ``skip_first`` takes all feature maps but the first, which is the stem (in vgg and MobileNetV1, which have
  no map of a stem, the first block); ``declared`` takes the stages that a network declares;
- ``SM_HIDDEN``: the hidden layer has the width of the output;
- ``SM_EPOCHS``, ``SM_LR``, ``SM_LR_DECAY_STAGES``, ``SM_LR_DECAY_RATE``, ``SM_MOMENTUM``, ``SM_WEIGHT_DECAY``: the
  first phase has the recipe of SSKD's comparable phase;
- ``AUGMENT``, ``MIXUP_ALPHA``: Sec. 3.2 names MixUp. Each positive mixes its anchor with another image of the batch;
  partner and share are drawn for each positive. Shares are Beta(alpha, alpha), folded to at least 0.5, so that the
  anchor dominates. In the first phase labels are mixed by the same shares. ``rotation`` (Sec. 3.1) turns the anchor by
  90, 180 and 270 degrees;
- the softmax of a positive runs over the anchors; the paper's sentence on the dimension is unclear. Over the positives
  the loss has no lower bound (docs/readings.md);
- ``RANK_BY``: ranks come from the teacher's relations, or from the student's;
- ``RANK_DIM``: Eq. 8 ranks "between positive sample i and all anchor samples" (``anchor``); ``positive`` ranks within
  the anchor's column, where its own three positives compete for the first place;
- ``TIES``: good SMs rank the own anchor first in several stages. ``deep`` takes the deepest of these stages,
  ``shallow`` the first, as a plain argmin does;
- ``STAGE_REDUCTION``: the losses of several stages are summed, as in Eq. 7;
- L_angle is the mean over positives of the KL divergence, L_length the mean over entries. With the printed sums,
  L_length is 10^4 at the start and 300 L_angle is 10^3;
- ``MU_GRADIENT``: the gradient passes through the student's mu, as in RKD;
- ``KD_TEMPERATURE``, ``KD_TEMPERATURE_POSITIVE``: KD on anchors plus KD on positives. The paper seems to print 1 for
  both temperatures. The terms come from SSKD, which has 4 for both;
- ``DISTANCE_WEIGHT``, ``DISTANCE_STAGES``: the ablation's L_dist (Fig. 3b), Eq. 7 with the distances of Eq. 6: the KL
  divergence of ``softmax(-D / (mu TEMPERATURE))`` in all stages. The ablation gives it ``ANGLE_WEIGHT``'s weight.

The ablations: Fig. 3a is ``ANGLE_STAGES`` and ``LENGTH_STAGES`` 0 (all) or 1, Fig. 3b the weights, Fig. 3c
``SM_TRAINING``, Tab. 6 ``ANGLE_STAGES`` and ``LENGTH_STAGES`` 1 to 3. Two facts of each stage are monitored: SMP
accuracy, the share of positives whose own anchor has the best rank, and the share of positives that chose the stage.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, draws, require_one_shape, spatial_mean, unit
from mdistiller.functional.mixing import class_numbers, share_quantiles, smaller_shares
from mdistiller.models.facts import NetworkFacts
from mdistiller.options import MANY, WIDEST, Option, weight
from mdistiller.registry import InputError, check_choice

from ._base import Distiller, register_distiller
from ._common import generator_kept
from .KD import kd_loss

REDUCTIONS = ("mean", "sum")
DIMENSIONS = ("anchor", "positive")
SM_TRAININGS = ("ce", "contrastive", "none")

DEFAULTS = {
    "CE_WEIGHT": weight(1.0, "lambda_1, of the cross-entropy"),
    "KD_WEIGHT": weight(2.0, "lambda_2, of KD"),
    "ANGLE_WEIGHT": weight(300.0, "lambda_3, of L_angle"),
    "LENGTH_WEIGHT": weight(1.0, "lambda_4, of L_length"),
    "DISTANCE_WEIGHT": weight(0.0, "of the ablation's L_dist"),
    "KD_TEMPERATURE": Option(1.0, "temperature of KD on anchors", above=0),
    "KD_TEMPERATURE_POSITIVE": Option(1.0, "temperature of KD on positives", above=0),
    "TEMPERATURE": Option(0.5, "temperature of the relations", above=0),
    "ANGLE_STAGES": Option(1, "number of stages that a positive uses for L_angle; 0: all", at_least=0),
    "LENGTH_STAGES": Option(1, "number of stages for L_length; 0: all", at_least=0),
    "DISTANCE_STAGES": Option(0, "number of stages for L_dist; 0: all", at_least=0),
    "STAGES": Option("skip_first", "which maps are stages", one_of=("skip_first", "declared")),
    "AUGMENT": Option("mixup", "operation that makes positives from anchors", one_of=("mixup", "rotation")),
    "MIXUP_ALPHA": Option(1.0, "shares are Beta(alpha, alpha), folded", above=0),
    "RANK_BY": Option("teacher", "network whose relations are ranked", one_of=("teacher", "student")),
    "RANK_DIM": Option("anchor", "where a positive's anchor is ranked: among anchors or positives", one_of=DIMENSIONS),
    "TIES": Option("deep", "the chosen stage if ranks are equal", one_of=("deep", "shallow")),
    "STAGE_REDUCTION": Option("sum", "over the stages of a positive", one_of=REDUCTIONS),
    "MU_GRADIENT": Option(True, "the gradient passes through the student's mu"),
    "SM_WIDTH": Option(128, "entries of an embedding; ImageNet: 1280", at_least=1, at_most=WIDEST),
    "SM_HIDDEN": Option(0, "width of the SMs' hidden layer; 0: as SM_WIDTH", at_least=0, at_most=WIDEST),
    "SM_TRAINING": Option("ce", "training of the teacher's SMs; none: no SMs in either network", one_of=SM_TRAININGS),
    "SM_EPOCHS": Option(60, "epochs of SM_TRAINING", at_least=0, at_most=MANY),
    "SM_LR": Option(0.05, "learning rate of SM_TRAINING", above=0),
    "SM_LR_DECAY_STAGES": Option([30, 45], "epochs after which the rate falls", at_least=0),
    "SM_LR_DECAY_RATE": Option(0.1, "factor at each stage", above=0, at_most=1),
    "SM_MOMENTUM": Option(0.9, "momentum of SM_TRAINING", at_least=0, below=1),
    "SM_WEIGHT_DECAY": Option(5e-4, "weight decay of SM_TRAINING", at_least=0),
}
PAPER = "MDR: Multi-stage Decoupled Relational Knowledge Distillation with Adaptive Stage Selection"

POSITIVES = 3  # of each anchor
MIXUP_KEY = zlib.crc32(b"MDR's MixUp")
TEACHER_KEY, CLASSIFIER_KEY, STUDENT_KEY = 1, 2, 3  # keys of the seeds for initial weights

Batches = Callable[[int], Iterable[dict[str, Tensor]]]


def angle_matrix(z_pos: Tensor, z_anchor: Tensor) -> Tensor:
    """``A[i, j] = cos(z_pos[i], z_anchor[j])`` (Eq. 4). A zero vector has cosine 0 with all and a finite gradient.

    Args:
        z_pos: ``(M, D)``; gradient flows.
        z_anchor: ``(N, D)``; gradient flows.

    Returns:
        ``(M, N)`` in [-1, 1], in float32 or better.
    """
    with torch.autocast(z_pos.device.type, enabled=False):
        return unit(at_least_float32(z_pos)) @ unit(at_least_float32(z_anchor)).T


def length_matrix(z_pos: Tensor, z_anchor: Tensor, *, mu_gradient: bool = True) -> Tensor:
    """``| ||z_pos[i]|| - ||z_anchor[j]|| | / mu``, mu the mean over all pairs (Eq. 9, 10).

    Args:
        z_pos: ``(M, D)``; gradient flows.
        z_anchor: ``(N, D)``; gradient flows.
        mu_gradient: the gradient passes through mu.

    Returns:
        ``(M, N)`` of mean 1, in float32 or better; all 0 if all lengths are equal.
    """
    lengths, of_anchors = (at_least_float32(z).norm(dim=1) for z in (z_pos, z_anchor))
    difference = (lengths[:, None] - of_anchors).abs()
    return _over_its_mean(difference, mu_gradient)


def distance_matrix(z_pos: Tensor, z_anchor: Tensor, *, mu_gradient: bool = True) -> Tensor:
    """``||z_pos[i] - z_anchor[j]|| / mu``, mu the mean over all pairs (Eq. 6). Arguments as :func:`length_matrix`."""
    z_pos, z_anchor = at_least_float32(z_pos), at_least_float32(z_anchor)
    distance = torch.cdist(z_pos, z_anchor, compute_mode="donot_use_mm_for_euclid_dist")  # exact for near vectors
    return _over_its_mean(distance, mu_gradient)


def pair_ranks(matrix: Tensor, anchor_of: Tensor, *, descending: bool, dim: str = "anchor") -> Tensor:
    """Rank of each positive's own anchor (Eq. 8): the number of strictly better ones. 0 is the best rank.

    Args:
        matrix: ``(M, N)`` relations of positives (rows) and anchors.
        anchor_of: ``(M,)`` int64, the column of each positive's own anchor.
        descending: a large value is good (similarities); else a small value is good (distances).
        dim: ``"anchor"`` compares with the other anchors, in the positive's row; ``"positive"`` compares with the other
            positives, in the anchor's column.

    Returns:
        ``(M,)`` int64.

    Raises:
        InputError: an unknown ``dim``.
    """
    check_choice("dim", dim, DIMENSIONS)
    own = matrix.gather(1, anchor_of[:, None])
    others = matrix if dim == "anchor" else matrix.T[anchor_of]
    return (others > own if descending else others < own).sum(1)


def select_stages(ranks: Tensor, n: int = 1, ties: str = "deep") -> Tensor:
    """The stages of the ``n`` best ranks of each positive, best first (Eq. 8).

    Args:
        ranks: ``(K, M)`` int64, stages from shallow to deep, 0 is the best rank.
        n: 1 to K.
        ties: for equal ranks, ``"deep"`` prefers the deeper stage, ``"shallow"`` the shallower.

    Returns:
        ``(n, M)`` int64, 0 to K - 1.

    Raises:
        InputError: ``n`` out of range or unknown ``ties``.
    """
    check_choice("ties", ties, DEFAULTS["TIES"].one_of)
    stages = len(ranks)
    if not 1 <= n <= stages:
        raise InputError(f"cannot select {n} of {stages} stages; from 1 to {stages} are possible")
    order = torch.arange(stages, device=ranks.device)[:, None]
    preference = ranks * stages + (stages - 1 - order if ties == "deep" else order)  # no two in a column are equal
    return preference.topk(n, dim=0, largest=False).indices


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    chosen: Tensor,
    *,
    temperature: float = 0.5,
    relation_dim: str = "anchor",
    reduction: str = "mean",
    stage_reduction: str = "sum",
) -> Tensor:
    """``T^2 * KL(softmax(A_t / T) || softmax(A_s / T))``, A a positive's similarities in a chosen stage (Eq. 12).

    Plain form: tests/oracles/mdr.py.

    Args:
        student: ``(K, M, N)`` similarities, a large value is near; gradient flows.
        teacher: ``(K, M, N)``; constant.
        chosen: ``(n, M)`` int64, stages of each positive.
        temperature: T > 0.
        relation_dim: the softmax runs over the anchors (``"anchor"``) or over the positives (``"positive"``).
        reduction: over positives, ``"mean"`` or ``"sum"``.
        stage_reduction: over the n chosen stages, ``"sum"`` or ``"mean"``.

    Returns:
        Scalar ``()`` in float32 or better. Over the anchors it is 0 for equal similarities, else positive.

    Raises:
        InputError: similarities of different shapes, or an unknown name.

    Example:
        >>> student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> relation_kl(student, teacher, chosen=torch.tensor([[0]]))
        tensor(0.0820)
    """
    require_one_shape("relation_kl", student, teacher)
    check_choice("relation_dim", relation_dim, DIMENSIONS)
    for key, value in (("reduction", reduction), ("stage_reduction", stage_reduction)):
        check_choice(key, value, REDUCTIONS)
    dim = 2 if relation_dim == "anchor" else 1
    log_s = _pick(F.log_softmax(at_least_float32(student) / temperature, dim), chosen)
    log_t = _pick(F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim), chosen)
    total = F.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature**2
    positives = student.shape[1] if reduction == "mean" else 1
    return total / (positives * (len(chosen) if stage_reduction == "mean" else 1))


def length_loss(
    student: Tensor, teacher: Tensor, chosen: Tensor, *, reduction: str = "mean", stage_reduction: str = "sum"
) -> Tensor:
    """``mean((Dif_s - Dif_t)^2)`` over the M x N entries in the chosen stages (Eq. 11; :func:`length_matrix`).

    Args:
        student: ``(K, M, N)``; gradient flows.
        teacher: ``(K, M, N)``; constant.
        chosen: ``(n, M)`` int64, stages of each positive.
        reduction: over the entries, ``"mean"`` or ``"sum"``.
        stage_reduction: over the n chosen stages, ``"sum"`` or ``"mean"``.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: relations of different shapes, or an unknown name.

    Example:
        >>> student, teacher = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> length_loss(student, teacher, chosen=torch.tensor([[0]]))
        tensor(1.)
    """
    require_one_shape("length_loss", student, teacher)
    for key, value in (("reduction", reduction), ("stage_reduction", stage_reduction)):
        check_choice(key, value, REDUCTIONS)
    squares = (_pick(at_least_float32(student), chosen) - _pick(at_least_float32(teacher.detach()), chosen)).square()
    total = squares.mean() * len(chosen) if reduction == "mean" else squares.sum()
    return total / len(chosen) if stage_reduction == "mean" else total


class Positives(NamedTuple):
    """Augmented anchors. Row ``p * N + j`` is the p-th positive of anchor j.

    Args:
        images: ``(M, 3, H, W)``.
        anchor: ``(M,)`` int64, position of the anchor in the batch.
        partner: ``(M,)`` int64, position of the image that was mixed in.
        share: ``(M,)`` share of the anchor in the image; 1 without a mixture.
    """

    images: Tensor
    anchor: Tensor
    partner: Tensor
    share: Tensor


def rotated(image: Tensor) -> Positives:
    """Each image turned by 90, 180 and 270 degrees counter-clockwise.

    Args:
        image: ``(N, 3, H, H)``.

    Raises:
        InputError: images that are not square.
    """
    if image.shape[2] != image.shape[3]:
        raise InputError(f"MDR.AUGMENT rotation needs square images, got {tuple(image.shape[2:])}; use mixup")
    anchor = _anchors(image)
    turned = torch.cat([image.rot90(quarters, (2, 3)) for quarters in range(1, POSITIVES + 1)])
    return Positives(turned, anchor, anchor, torch.ones_like(turned[:, 0, 0, 0]))


def mixed(image: Tensor, index: Tensor, epoch: int, seed: int, quantiles: Tensor, alpha: float) -> Positives:
    """Each image mixed with three others of the batch. The draws are functions of seed, epoch and index.

    Args:
        image: ``(N, 3, H, W)``. A single image is mixed with itself.
        index: ``(N,)`` int64, positions in the training set.
        epoch: from 1.
        seed: of the run.
        quantiles: :func:`~mdistiller.functional.mixing.share_quantiles` of ``alpha``.
        alpha: of Beta(alpha, alpha).
    """
    count, anchor = len(image), _anchors(image)
    slot = torch.arange(POSITIVES, device=index.device)[:, None]
    start = draws.hash_keys(seed, MIXUP_KEY, epoch, index)
    offset = draws.integers(1, max(count, 2), 2 * slot, start=start).flatten()
    minor = smaller_shares(draws.uniform(2 * slot + 1, start=start).flatten(), quantiles, alpha)
    share, partner = (1 - minor).to(image.dtype), (anchor + offset) % count
    weight = share[:, None, None, None]
    return Positives(weight * image[anchor] + (1 - weight) * image[partner], anchor, partner, share)


@register_distiller("MDR", DEFAULTS, paper=PAPER, family="relation")
class MDR(Distiller):
    """KD, and angles and lengths between images, at the stage that tells them apart best in the teacher.

    Without :meth:`prepare` the teacher's SMs have their initial weights: random projections of its stages.
    """

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = own = cfg.MDR
        self.seed = cfg.EXPERIMENT.SEED
        of_student, of_teacher = self.network_facts(cfg)
        self.student_stages, self.teacher_stages = stages_of(of_student, own.STAGES), stages_of(of_teacher, own.STAGES)
        self.stages = len(self.student_stages)
        if self.stages != len(self.teacher_stages) or not self.stages:
            raise InputError(
                f"MDR relates stages one to one, but the {of_student} has {self.stages} stages and the {of_teacher} "
                f"{len(self.teacher_stages)} (by MDR.STAGES); choose networks with equally many stages, or, where they "
                "declare as many, MDR.STAGES declared"
            )
        for key in ("ANGLE_STAGES", "LENGTH_STAGES", "DISTANCE_STAGES"):
            if own[key] > self.stages:
                raise InputError(
                    f"MDR.{key} must be from 0 (all) to {self.stages}, the number of stages, got {own[key]}"
                )
        if own.AUGMENT == "rotation" and own.MIXUP_ALPHA != 1:
            raise InputError(
                f"MDR.MIXUP_ALPHA {own.MIXUP_ALPHA} belongs to MDR.AUGMENT mixup, got rotation; leave it at 1"
            )
        if own.DISTANCE_STAGES and not own.DISTANCE_WEIGHT:
            raise InputError(f"MDR.DISTANCE_STAGES {own.DISTANCE_STAGES} belongs to a DISTANCE_WEIGHT, which is 0")
        self.teacher_modules, _ = self._fresh_teacher_modules()
        self.teacher_modules.requires_grad_(False).eval()
        self.student_modules = self._build_modules(of_student, self.student_stages, STUDENT_KEY)
        self.register_buffer("quantiles", share_quantiles(own.MIXUP_ALPHA), persistent=False)

    @property
    def student_images_per_sample(self) -> int:
        """The anchor and its positives; the anchor alone if no term needs positives."""
        return 1 + POSITIVES if self.own.KD_WEIGHT or self.uses_relations else 1

    @property
    def uses_relations(self) -> bool:
        return any((self.own.ANGLE_WEIGHT, self.own.LENGTH_WEIGHT, self.own.DISTANCE_WEIGHT))

    def train(self, mode: bool = True) -> MDR:
        super().train(mode)
        self.teacher_modules.eval()
        return self

    def forward_train(
        self, image: Tensor, target: Tensor, index: Tensor | None = None, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own, count = self.own, len(image)
        self.monitors = {}
        if self.student_images_per_sample == 1:
            logits, _ = self.student(image)
            return logits, {"loss_ce": own.CE_WEIGHT * F.cross_entropy(logits, target)}
        positives = self.positives(image, index, epoch)
        images = torch.cat([image, positives.images])
        logits_s, features_s = self.student(images)
        with torch.no_grad():
            logits_t, features_t = self.teacher(images)
        losses = {"loss_ce": own.CE_WEIGHT * F.cross_entropy(logits_s[:count], target)}
        if own.KD_WEIGHT:
            kd = kd_loss(logits_s[:count], logits_t[:count], own.KD_TEMPERATURE)
            kd = kd + kd_loss(logits_s[count:], logits_t[count:], own.KD_TEMPERATURE_POSITIVE)
            losses["loss_kd"] = own.KD_WEIGHT * kd
        if self.uses_relations:
            with torch.autocast(image.device.type, enabled=False):
                z_s = embed(self.student_modules, pooled_stages(features_s, self.student_stages))
                with torch.no_grad():
                    z_t = embed(self.teacher_modules, pooled_stages(features_t, self.teacher_stages))
                losses |= self.relation_losses(z_s, z_t, positives.anchor)
        return logits_s[:count], losses

    def positives(self, image: Tensor, index: Tensor | None, epoch: int) -> Positives:
        """Three augmented images of each anchor. Without ``index``, positions in the batch replace it."""
        if self.own.AUGMENT == "rotation":
            return rotated(image)
        if index is None:
            index = torch.arange(len(image), device=image.device)
        return mixed(image, index, epoch, self.seed, self.quantiles, self.own.MIXUP_ALPHA)

    def relation_losses(self, z_s: list[Tensor], z_t: list[Tensor], anchor_of: Tensor) -> dict[str, Tensor]:
        """The weighted losses on the relations. This also fills ``monitors``.

        Args:
            z_s: the student's embeddings of each stage, ``(N + M, D)``, anchors first.
            z_t: the teacher's embeddings.
            anchor_of: ``(M,)`` int64, the anchor of each positive.
        """
        own, mu = self.own, {"mu_gradient": self.own.MU_GRADIENT}
        over_stages = {"stage_reduction": own.STAGE_REDUCTION}
        softened = {"temperature": own.TEMPERATURE, **over_stages}
        losses = {}
        if own.ANGLE_WEIGHT:
            student, teacher = _relations(angle_matrix, z_s), _relations(angle_matrix, z_t)
            chosen = self._choose("angle", student, teacher, anchor_of, own.ANGLE_STAGES)
            losses["loss_angle"] = own.ANGLE_WEIGHT * relation_kl(student, teacher, chosen, **softened)
            self._monitor("smp_student", _smp(student, anchor_of))
            self._monitor("smp_teacher", _smp(teacher, anchor_of))
        if own.LENGTH_WEIGHT:
            student, teacher = _relations(length_matrix, z_s, **mu), _relations(length_matrix, z_t)
            chosen = self._choose("length", student, teacher, anchor_of, own.LENGTH_STAGES)
            losses["loss_length"] = own.LENGTH_WEIGHT * length_loss(student, teacher, chosen, **over_stages)
        if own.DISTANCE_WEIGHT:
            student, teacher = _relations(distance_matrix, z_s, **mu), _relations(distance_matrix, z_t)
            chosen = self._choose("distance", student, teacher, anchor_of, own.DISTANCE_STAGES)
            losses["loss_distance"] = own.DISTANCE_WEIGHT * relation_kl(-student, -teacher, chosen, **softened)
        return losses

    @torch.no_grad()
    def _choose(self, kind: str, student: Tensor, teacher: Tensor, anchor_of: Tensor, count: int) -> Tensor:
        """The stages ``(n, M)`` for one kind of relation ``(K, M, N)``."""
        own = self.own
        ranks = [
            pair_ranks(matrix, anchor_of, descending=kind == "angle", dim=own.RANK_DIM)
            for matrix in (teacher if own.RANK_BY == "teacher" else student)
        ]
        chosen = select_stages(torch.stack(ranks), count or self.stages, own.TIES)
        taken = [(chosen == stage).any(0).float().mean() for stage in range(self.stages)]
        self._monitor(f"{kind}_share", taken)
        return chosen

    def _monitor(self, name: str, values: Iterable[Tensor]) -> None:
        self.monitors |= {f"{name}_{stage}": value for stage, value in enumerate(values, 1)}

    # The first phase

    def prepare(self, batches: Batches, autocast: Callable[[], AbstractContextManager]) -> dict[str, Any]:
        """Train the teacher's SMs from their initial weights.

        ``SM_TRAINING`` says how: ``ce``, the cross-entropy of a temporary classifier on anchors and positives, or
        ``contrastive``, Eq. 5; summed over the stages. The result depends on the seed and not on the student.

        Args:
            batches: gives the batches of an epoch, as ``forward_train`` gets them.
            autocast: context for the networks.

        Returns:
            Means over the last epoch: the loss; for each stage SMP accuracy and the classifier's accuracy on anchors.
        """
        own = self.own
        if own.SM_TRAINING == "none":
            return {}
        like = next(self.teacher.parameters())
        trained = nn.ModuleList(self._fresh_teacher_modules()).to(like.device, like.dtype)
        modules, classifiers = trained
        rate = {"lr": own.SM_LR, "momentum": own.SM_MOMENTUM, "weight_decay": own.SM_WEIGHT_DECAY}
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], **rate)
        facts: dict[str, Any] = {}
        for epoch in range(1, own.SM_EPOCHS + 1):
            passed = sum(epoch > stage for stage in own.SM_LR_DECAY_STAGES)
            optimizer.param_groups[0]["lr"] = own.SM_LR * own.SM_LR_DECAY_RATE**passed
            sums, images = torch.zeros((), dtype=torch.float64, device=like.device), 0
            for batch in batches(epoch):
                loss, found = self._prepare_step(batch, epoch, modules, classifiers, autocast)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                count = len(batch["target"])
                sums = sums + count * torch.stack([loss.detach(), *found]).double()
                images += count
            mean, *shares = (sums / images).tolist()
            facts = {"loss": mean, "smp": shares[: self.stages]}
            if own.SM_TRAINING == "ce":
                facts["accuracy"] = shares[self.stages :]
        self.teacher_modules.load_state_dict(modules.state_dict())
        return facts

    def preparation(self) -> tuple[nn.Module, dict[str, Any]]:
        """The modules that :meth:`prepare` trains, and the settings on which they depend.

        They also depend on teacher, data and seed.
        """
        if not self.uses_relations:
            return nn.Identity(), {}  # no term uses the modules
        used = {"STAGES", "AUGMENT", "MIXUP_ALPHA"} | {key for key in self.own if key.startswith("SM_")}
        if self.own.SM_TRAINING == "contrastive":
            used.add("TEMPERATURE")
        settings = {key: self.own[key] for key in sorted(used)}
        return self.teacher_modules, settings

    def _prepare_step(
        self,
        batch: dict[str, Tensor],
        epoch: int,
        modules: nn.ModuleList,
        classifiers: nn.ModuleList,
        autocast: Callable[[], AbstractContextManager],
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of a batch; each stage's SMP accuracy; each classifier's accuracy on anchors."""
        image, target = batch["image"], batch["target"]
        positives, count = self.positives(image, batch.get("index"), epoch), len(image)
        with torch.no_grad(), autocast():
            _, features = self.teacher(torch.cat([image, positives.images]))
        z = embed(modules, pooled_stages(features, self.teacher_stages))
        angles = _relations(angle_matrix, z)
        smp = _smp(angles, positives.anchor)
        if self.own.SM_TRAINING == "contrastive":  # Eq. 5
            losses = [F.cross_entropy(stage / self.own.TEMPERATURE, positives.anchor) for stage in angles]
            return torch.stack(losses).sum(), smp
        logits = [classifier(stage) for classifier, stage in zip(classifiers, z, strict=True)]
        losses = [mixed_cross_entropy(stage, target, positives) for stage in logits]
        return torch.stack(losses).sum(), [
            *smp,
            *((stage[:count].argmax(1) == class_numbers(target)).float().mean() for stage in logits),
        ]

    # Parts

    def _fresh_teacher_modules(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The teacher's SMs and their classifiers with the seed's initial weights."""
        modules = self._build_modules(self.teacher_facts, self.teacher_stages, TEACHER_KEY)
        with generator_kept(self._seed_of(CLASSIFIER_KEY)):
            return modules, nn.ModuleList(nn.Linear(self.own.SM_WIDTH, self.teacher_facts.classes) for _ in modules)

    def _seed_of(self, key: int) -> int:
        return int(draws.hash_keys(self.seed, key))

    def _build_modules(self, facts: NetworkFacts, stages: tuple[int, ...], key: int) -> nn.ModuleList:
        own = self.own
        widths = [facts.channels[stage] for stage in stages]
        if own.SM_TRAINING == "none":
            return nn.ModuleList(nn.Identity() for _ in widths)
        hidden = own.SM_HIDDEN or own.SM_WIDTH
        with generator_kept(self._seed_of(key)):
            return nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, own.SM_WIDTH)) for width in widths
            )


def embed(modules: nn.ModuleList, pooled: list[Tensor]) -> list[Tensor]:
    """Each stage's pooled features ``(B, C)`` through its module, ``(B, D)``, in full precision."""
    with torch.autocast(pooled[0].device.type, enabled=False):
        return [module(features) for module, features in zip(modules, pooled, strict=True)]


def pooled_stages(features: dict[str, Any], stages: tuple[int, ...]) -> list[Tensor]:
    """The maps of the stages, averaged over their positions: ``(B, C)`` each, in float32 or better."""
    return [spatial_mean(features["feats"][stage]) for stage in stages]


def stages_of(facts: NetworkFacts, rule: str) -> tuple[int, ...]:
    """Numbers of the maps that are stages, by ``MDR.STAGES``: the declared stages, or all maps but the first."""
    return facts.stages if rule == "declared" else tuple(range(1, len(facts.need("shapes"))))


def mixed_cross_entropy(logits: Tensor, target: Tensor, positives: Positives) -> Tensor:
    """Mean cross-entropy over anchors and positives. A positive's labels are mixed as its images are.

    Args:
        logits: ``(N + M, C)``, anchors first; gradient flows.
        target: ``(N,)`` class numbers of the anchors, or their shares ``(N, C)``.
        positives: anchor, partner and share of each positive.

    Returns:
        Scalar ``()``.
    """
    own, other = target[positives.anchor], target[positives.partner]
    anchors, augmented = logits.split([len(target), len(own)])
    share = positives.share
    mixture = share * F.cross_entropy(augmented, own, reduction="none")
    mixture = mixture + (1 - share) * F.cross_entropy(augmented, other, reduction="none")
    return (F.cross_entropy(anchors, target, reduction="sum") + mixture.sum()) / len(logits)


def _anchors(image: Tensor) -> Tensor:
    return torch.arange(len(image), device=image.device).repeat(POSITIVES)


def _over_its_mean(matrix: Tensor, mu_gradient: bool) -> Tensor:
    mu = matrix.mean() if mu_gradient else matrix.mean().detach()
    return matrix / mu.masked_fill(mu == 0, 1)


def _relations(matrix: Callable[..., Tensor], z: list[Tensor], **options: Any) -> Tensor:
    """``(K, M, N)`` from each stage's embeddings ``(N + 3N, D)``."""
    anchors = len(z[0]) // (1 + POSITIVES)
    return torch.stack([matrix(stage[anchors:], stage[:anchors], **options) for stage in z])


def _pick(matrices: Tensor, chosen: Tensor) -> Tensor:
    """The rows ``(n, M, N)`` of each positive's chosen stages, from ``(K, M, N)``."""
    return matrices[chosen, torch.arange(chosen.shape[1], device=chosen.device)]


@torch.no_grad()
def _smp(angles: Tensor, anchor_of: Tensor) -> list[Tensor]:
    """For each stage, the share of positives whose own anchor has rank 0."""
    return [(pair_ranks(matrix, anchor_of, descending=True) == 0).float().mean() for matrix in angles]
