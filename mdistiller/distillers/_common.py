"""What several methods share: modules that fit a student's features to its teacher's, facts about networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import gradient_in_layout
from mdistiller.messages import warn
from mdistiller.options import Option, weight
from mdistiller.registry import InputError, check_choice, image_side

from ._base import Distiller

STAGE_RULES = ("matched", "skip_first")
STAGES = Option("matched", "which maps are compared, see stage_offset; skip_first: mdistiller's", one_of=STAGE_RULES)


def feature_losses(weight_of_features: float) -> dict[str, Option]:
    """The section ``LOSS`` of a method that compares features."""
    return {
        "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
        "FEAT_WEIGHT": weight(weight_of_features, "of the distance of the features"),
    }


class FeatureDistiller(Distiller):
    """Cross-entropy on the labels plus a distance of the networks' features, which a method defines.

    Its weights are ``LOSS.CE_WEIGHT`` and ``LOSS.FEAT_WEIGHT`` of the method's section.
    """

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        weights = cfg[self.section].LOSS
        self.ce_weight, self.feat_weight = weights.CE_WEIGHT, weights.FEAT_WEIGHT

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        """The loss ``()``, unweighted, of what the networks return beside their logits; the teacher's is constant."""
        raise NotImplementedError(f"{type(self).__name__} has no distance")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_weight * self.distance(features_student, features_teacher),
        }


class ConvReg(nn.Module):
    """FitNet's regressor: one convolution and a batch norm from the student's map to the shape of the teacher's.

    Args:
        s_shape: of the student's map, ``(B, C, H, W)``; B does not matter.
        t_shape: of the teacher's.
        use_relu: end with a ReLU.

    Raises:
        InputError: a student's map that is smaller than the teacher's in another ratio than 1 to 2.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> None:
        super().__init__()
        self.use_relu = use_relu
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
        x = self.bn(self.conv(x))
        return F.relu(x) if self.use_relu else x


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of the maps in ``"feats"`` of both networks, ``(1, C, H, W)`` each.

    The networks stay as they are, see :func:`answer_to_black`.

    Args:
        student: returns ``(logits, features)``.
        teacher: the same.
        input_size: of the images, ``(H, W)``.
    """
    return _shapes(student, input_size), _shapes(teacher, input_size)


def stage_offset(student: nn.Module, teacher: nn.Module, num_s: int, num_t: int, rule: str) -> int:
    """By how much the number of a student's map in ``"feats"`` exceeds that of the teacher's map it belongs to.

    Args:
        student: may say by ``get_stage_indices()`` which maps are stages; else all but the first are.
        teacher: the same.
        num_s: how many maps the student has.
        num_t: how many the teacher has.
        rule: ``"matched"``: the i-th map belongs to the i-th where both networks have equally many; else their first
            stages belong together, also where only one of them has a map of its stem before. ``"skip_first"``: the
            i-th belongs to the i-th, mdistiller's rule.

    Raises:
        InputError: an unknown rule.
    """
    check_choice("STAGES", rule, STAGE_RULES)
    if rule == "skip_first" or num_s == num_t:
        return 0
    return _first_stage(student) - _first_stage(teacher)


def stage_pairs(student: nn.Module, teacher: nn.Module, num_s: int, num_t: int, rule: str) -> list[tuple[int, int]]:
    """Numbers in ``"feats"`` of student and teacher of the maps that are compared, shallow to deep.

    The first map of networks that have equally many is left out, as in mdistiller: the stem, or a first block in both.
    Where one network has more stages, its deepest are left over, which is said in a warning.

    Args:
        student, teacher, num_s, num_t, rule: see :func:`stage_offset`.

    Raises:
        InputError: an unknown rule.
    """
    offset = stage_offset(student, teacher, num_s, num_t, rule)
    first = 1 - max(offset, 0)
    pairs = list(zip(range(first + offset, num_s), range(first, num_t), strict=False))
    for role, last, number in (("student", pairs[-1][0], num_s), ("teacher", pairs[-1][1], num_t)):
        if last != number - 1:
            warn(
                f"student {type(student).__name__} has {num_s} feature maps, teacher {type(teacher).__name__} {num_t}: "
                f"the {role}'s from {last + 1} to {number - 1} are compared with none"
            )
    return pairs


def configured_stage_pairs(student: nn.Module, teacher: nn.Module, cfg: Any, rule: str) -> list[tuple[int, int]]:
    """:func:`stage_pairs` of two networks, which are asked by one black image of the data set's size."""
    side = image_side(cfg)
    maps_s, maps_t = get_feat_shapes(student, teacher, (side, side))
    return stage_pairs(student, teacher, len(maps_s), len(maps_t), rule)


def pick_pairs(
    features_s: dict[str, Any], features_t: dict[str, Any], pairs: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The maps of both networks that ``pairs`` numbers; see :func:`~mdistiller.functional.gradient_in_layout`."""
    return [gradient_in_layout(features_s["feats"][i]) for i, _ in pairs], [features_t["feats"][j] for _, j in pairs]


def _first_stage(net: nn.Module) -> int:
    return net.get_stage_indices()[0] if hasattr(net, "get_stage_indices") else 1


def _shapes(net: nn.Module, input_size: Sequence[int]) -> list[torch.Size]:
    return [feat.shape for feat in answer_to_black(net, input_size)[1]["feats"]]


def answer_to_black(net: nn.Module, input_size: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """Logits ``(1, K)`` and features that a network gives for one black image of ``(H, W)`` pixels.

    It is asked in eval mode without gradient: no statistics move, no random number is drawn, and every module is in the
    mode in which it was.

    Raises:
        InputError: it returns something else, or no maps ``feats``.
    """
    like = next(net.parameters())
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            output = net(torch.zeros(1, 3, *input_size, device=like.device, dtype=like.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
    is_pair = isinstance(output, (tuple, list)) and len(output) == 2
    if not (is_pair and isinstance(output[1], Mapping) and "feats" in output[1]):
        raise InputError(
            f"{type(net).__name__} must return (logits, features) with the maps of its stages in features['feats'], "
            "which this method reads: see mdistiller/models/_features.py"
        )
    return output


def warmup(epoch: int, epochs: int) -> float:
    """The share of a term's weight that counts in ``epoch`` (from 1): it rises linearly over ``epochs``, then is 1."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


def count_classes(network: nn.Module) -> int | None:
    """The classes of a network: the width of its last linear layer, ``None`` where it has none.

    A forward pass would tell too, but takes an input of the right size and disturbs BatchNorm and random states.
    """
    classifier = last_linear(network)
    return None if classifier is None else classifier.out_features


def pooled_width(network: nn.Module, role: str, otherwise: int | None = None) -> int:
    """The width of ``pooled_feat``: what the network's last linear layer, its classifier, reads.

    Args:
        network: whose.
        role: what it is, for the message.
        otherwise: the answer for a network without a linear layer.

    Raises:
        InputError: it has none, and ``otherwise`` is not given.
    """
    classifier = last_linear(network)
    if classifier is not None:
        return classifier.in_features
    if otherwise is None:
        raise InputError(f"the width of the {role}'s pooled_feat is read off its last nn.Linear, and it has none")
    return otherwise


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The classifier, as far as its place tells; ``None`` for a network without a linear layer."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def wants_standardised_logits(cfg: Any, student: nn.Module) -> bool:
    """``EXPERIMENT.LOGIT_STAND``, LSKD's switch.

    Raises:
        InputError: it is on, and there are so few classes that nothing would be left of the logits.
    """
    wanted, classes = cfg.EXPERIMENT.LOGIT_STAND, count_classes(student)
    if wanted and classes is not None and classes <= 2:
        raise InputError(
            f"EXPERIMENT.LOGIT_STAND: with {classes} classes, standardised logits only say which class is ahead; "
            "set EXPERIMENT.LOGIT_STAND False"
        )
    return wanted


def preact_maps(features: dict[str, Any]) -> list[Tensor]:
    """A network's maps before their activation; where it gives none, its maps end without one (MobileNetV2)."""
    return features["preact_feats" if "preact_feats" in features else "feats"]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let a network's batch norms use each batch's statistics, and keep their running ones as they are."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracking
