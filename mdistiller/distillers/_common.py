"""Parts that several methods share: modules that fit a student's features to its teacher's, and the pairs of stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import gradient_in_layout
from mdistiller.messages import warn
from mdistiller.models.facts import NetworkFacts, facts_of
from mdistiller.options import Option, weight
from mdistiller.registry import InputError, check_choice

from ._base import Distiller

STAGE_RULES = ("matched", "skip_first")
STAGES = Option(
    "matched", "which maps are compared, see stage_offset; skip_first: as in mdistiller", one_of=STAGE_RULES
)


def feature_losses(weight_of_features: float) -> dict[str, Option]:
    """The section ``LOSS`` of a method that compares features."""
    return {
        "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
        "FEAT_WEIGHT": weight(weight_of_features, "of the distance of the features"),
    }


class FeatureDistiller(Distiller):
    """Cross-entropy on the labels plus a distance of the networks' features. A method defines the distance.

    The weights are ``LOSS.CE_WEIGHT`` and ``LOSS.FEAT_WEIGHT`` of the method's section.
    """

    mixed_labels = True
    reads_teacher_logits = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        weights = cfg[self.section].LOSS
        self.ce_weight, self.feat_weight = weights.CE_WEIGHT, weights.FEAT_WEIGHT

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        """The unweighted loss ``()`` of the two networks' ``features``. The teacher's are constant."""
        raise NotImplementedError(f"{type(self).__name__} has no distance")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_weight * self.distance(features_student, features_teacher),
        }


def logit_losses(weight_of_logits: float, ce_weight: float = 1.0) -> dict[str, Option]:
    """The section ``LOSS`` of a method that compares logits."""
    return {
        "CE_WEIGHT": weight(ce_weight, "of the cross-entropy"),
        "KD_WEIGHT": weight(weight_of_logits, "of the distance of the logits"),
    }


class LogitDistiller(Distiller):
    """Cross-entropy on the labels plus a distance of the networks' logits. A method defines the distance.

    The weights are ``LOSS.CE_WEIGHT`` and ``LOSS.KD_WEIGHT`` of the method's section.
    """

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg[self.section]

    def distance(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        """The unweighted loss ``()`` of logits ``(B, K)``. The teacher's are constant."""
        raise NotImplementedError(f"{type(self).__name__} has no distance")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        return logits_student, {
            "loss_ce": self.own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": self.own.LOSS.KD_WEIGHT * self.distance(logits_student, logits_teacher, target),
        }


class ConvReg(nn.Module):
    """FitNet's regressor: one convolution and a batch norm from the student's map to the shape of the teacher's.

    Args:
        s_shape: shape of the student's map, ``(B, C, H, W)``; B does not matter.
        t_shape: shape of the teacher's map.
        use_relu: end with a ReLU.
        use_bn: without a ReLU, end with the batch norm.

    Raises:
        InputError: the student's map is smaller than the teacher's, and not by a factor of 2.
    """

    def __init__(
        self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True, use_bn: bool = True
    ) -> None:
        super().__init__()
        self.use_relu, self.use_bn = use_relu, use_bn
        (_, s_channels, *s_size), (_, t_channels, *t_size) = s_shape, t_shape
        if s_size == [2 * side for side in t_size]:
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=3, stride=2, padding=1)
        elif t_size == [2 * side for side in s_size]:
            self.conv = nn.ConvTranspose2d(s_channels, t_channels, kernel_size=4, stride=2, padding=1)
        elif all(s >= t for s, t in zip(s_size, t_size, strict=True)):
            kernel = tuple(1 + s - t for s, t in zip(s_size, t_size, strict=True))
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=kernel)
        else:
            raise InputError(
                f"ConvReg takes a student's map to a teacher's that is smaller, equal or twice as large, not "
                f"{'x'.join(map(str, s_size))} to {'x'.join(map(str, t_size))}; choose other layers or another pair"
            )
        self.bn = nn.BatchNorm2d(t_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.use_relu:
            return F.relu(self.bn(x))
        return self.bn(x) if self.use_bn else x


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of the maps in ``"feats"`` of both networks, ``(1, C, H, W)`` each.

    The state of the networks does not change, see :func:`~mdistiller.models.facts.facts_of`.

    Args:
        student: returns ``(logits, features)``.
        teacher: returns ``(logits, features)``.
        input_size: ``(H, W)`` of the images.
    """
    networks = ((student, "student"), (teacher, "teacher"))
    return tuple(list(facts_of(network, input_size, role).need("shapes")) for network, role in networks)


def stage_offset(student: NetworkFacts, teacher: NetworkFacts, rule: str) -> int:
    """The offset by which student map ``j + offset`` is compared with teacher map ``j``.

    Args:
        student: facts of the student, which has maps.
        teacher: facts of the teacher, which has maps.
        rule: ``"matched"``: with equal numbers of maps, the i-th map is compared with the i-th. Else the networks'
            first stages are compared with each other, even if only one network has a map of its stem before. If one
            network has more stages and the strides of these pairs differ, the deepest maps are compared with each
            other. ``"skip_first"``: the i-th map with the i-th, mdistiller's rule.

    Raises:
        InputError: an unknown rule; a network without maps.
    """
    check_choice("STAGES", rule, STAGE_RULES)
    num_s, num_t = len(student.need("shapes")), len(teacher.need("shapes"))
    if rule == "skip_first" or num_s == num_t:
        return 0
    first_s, first_t = map(_first_stage, (student, teacher))
    strides = zip(student.strides[first_s:], teacher.strides[first_t:], strict=False)
    if num_s - first_s == num_t - first_t or all(a == b for a, b in strides):
        return first_s - first_t
    return num_s - num_t


def _first_stage(facts: NetworkFacts) -> int:
    return facts.stages[0] if facts.stages else 1


def stage_pairs(student: NetworkFacts, teacher: NetworkFacts, rule: str) -> list[tuple[int, int]]:
    """Pairs of maps that are compared: numbers in ``"feats"`` of student and teacher, shallow to deep.

    With equal numbers of maps, the first map of both is left out, as in mdistiller: the stem, or a first block. If one
    network has more stages, a warning names the maps that are left over.

    Args:
        student, teacher, rule: see :func:`stage_offset`.

    Raises:
        InputError: an unknown rule; a network without maps; networks without common stages.
    """
    offset = stage_offset(student, teacher, rule)
    num_s, num_t = len(student.need("shapes")), len(teacher.need("shapes"))
    first = max(_first_stage(teacher), _first_stage(student) - offset, -offset) if offset else 1
    pairs = list(zip(range(first + offset, num_s), range(first, num_t), strict=False))
    found = f"the {student} has {num_s} feature maps, the {teacher} {num_t}"
    if not pairs:
        raise InputError(
            f"{found}: no stages are left to compare; let the networks return more maps, or choose other networks"
        )
    for facts, used, number in ((student, [s for s, _ in pairs], num_s), (teacher, [t for _, t in pairs], num_t)):
        left = [place for place in range(_first_stage(facts), number) if place not in used]
        if left and num_s - _first_stage(student) != num_t - _first_stage(teacher):
            warn(f"{found}: the {facts.role}'s maps {left[0]} to {left[-1]} are not compared")
    return pairs


def pick_pairs(
    features_s: dict[str, Any], features_t: dict[str, Any], pairs: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Both networks' maps of the ``pairs``. The student's have :func:`~mdistiller.functional.gradient_in_layout`."""
    return [gradient_in_layout(features_s["feats"][i]) for i, _ in pairs], [features_t["feats"][j] for _, j in pairs]


def warmup(epoch: int, epochs: int) -> float:
    """The factor of a term's weight in ``epoch`` (from 1): it rises linearly to 1 over ``epochs`` epochs."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


def wants_standardised_logits(distiller: Distiller, cfg: Any) -> bool:
    """The value of ``EXPERIMENT.LOGIT_STAND``, LSKD's switch.

    Raises:
        InputError: the switch is on and there are at most two classes.
    """
    wanted = cfg.EXPERIMENT.LOGIT_STAND
    if wanted and (classes := distiller.network_facts(cfg)[0].classes) <= 2:
        raise InputError(
            f"EXPERIMENT.LOGIT_STAND: with {classes} classes, standardised logits keep only the order of the classes; "
            "set EXPERIMENT.LOGIT_STAND False"
        )
    return wanted


@contextmanager
def generator_kept(seed: int | None = None) -> Iterator[None]:
    """Context for the creation of a method's modules: restores the state of torch's CPU generator afterwards.

    Args:
        seed: seed of the generator within the context; ``None``: its current state.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def preact_maps(features: dict[str, Any]) -> list[Tensor]:
    """A network's maps before their activation, or all its maps if they have no activation (MobileNetV2)."""
    return features["preact_feats" if "preact_feats" in features else "feats"]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Context in which a network's batch norms use each batch's statistics and do not change their running ones."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracking


def zero_of(module: nn.Module) -> Tensor:
    """0 ``()`` with a gradient, 0 too, for each parameter: the optimiser then has one in every step."""
    return 0 * sum(p.sum() for p in module.parameters())


class StepCounter(nn.Module):
    """Counts steps. The number belongs to the state dict, and reading it does not wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.number = 0

    def step(self) -> int:
        """The number of earlier calls."""
        self.number += 1
        self.count += 1
        return self.number - 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.number = int(self.count)
