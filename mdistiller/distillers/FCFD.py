"""FCFD: the student's map should do in the teacher's later stages what the teacher's map does, and the reverse.

Liu, Kan, Shan, Chen. Function-Consistent Feature Distillation. ICLR 2023. arXiv:2304.11832. Shapes: B images, K
classes, n stages.

A *bridge* (convolution, batch norm, LeakyReLU if the network's maps are behind a ReLU) takes a stage's map of one
network to the shape of the other's. A mixed path begins in one network, crosses a bridge after stage k < n, and ends in
the other network. Each step draws ``PATHS`` of the 2 (n - 1) mixed paths. The loss is the sum of

- the cross-entropy and KD of the student;
- ``MIX_WEIGHT`` times KD of each mixed path's prediction (function);
- ``L2_WEIGHT`` times the mean squared differences to the teacher's map, of the bridged map of the student in each
  stage, and of the maps of paths that have crossed to the teacher; in the last stage also of the pooled features. This
  part grows to its weight over ``WARMUP`` epochs (appearance).

Stages that a path borrows use the batch's statistics, and their running statistics do not change. So the authors'
code; it also has the teacher in training mode (``TEACHER_BATCH_STATISTICS``). Departs from the code: the teacher's
running statistics do not change; the bridge of the last stage to the student, which nothing uses, is not made. The
networks must say how their stages run (``get_stages()``), and have equally many.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_one_shape, spatial_mean
from mdistiller.models._features import Stages
from mdistiller.models.facts import NetworkFacts, asked
from mdistiller.options import MANY, Option, weight
from mdistiller.registry import InputError, image_side

from ._base import Distiller, register_distiller
from ._common import StepCounter, batch_statistics, generator_kept, warmup, zero_of
from .KD import kd_loss

DEFAULTS = {
    "TEMPERATURE": Option(4.0, "of KD of the student and of the paths", above=0),
    "PATHS": Option(2, "mixed paths in a step", at_least=0),
    "WARMUP": Option(20, "epochs over which L2_WEIGHT grows", at_least=0, at_most=MANY),
    "TEACHER_BATCH_STATISTICS": Option(True, "the teacher uses batch statistics; False: its running statistics"),
    "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
    "KD_WEIGHT": weight(1.0, "of the student's KD"),
    "MIX_WEIGHT": weight(1.0, "of the paths' KD"),
    "L2_WEIGHT": weight(5.0, "of the differences of maps"),
}
PAPER = "Liu et al., ICLR 2023, arXiv:2304.11832"

Path = tuple[str, int]  # where it begins, and the stage after which it crosses


def appearance_loss(f: Tensor, f_t: Tensor, pooled: bool = False) -> Tensor:
    """``mean((f - F_t)^2)``; with ``pooled`` also of the mean over positions of both maps' ReLU.

    Args:
        f: ``(B, C, H, W)`` a map in the teacher's space; gradient flows.
        f_t: ``(B, C, H, W)``; constant.
        pooled: add the pooled features.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> f, f_t = torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)
        >>> appearance_loss(f, f_t), appearance_loss(f, f_t, pooled=True)
        (tensor(4.), tensor(5.))
    """
    require_one_shape("appearance_loss", f, f_t)
    f, f_t = gradient_in_layout(f), f_t.detach()
    loss = F.mse_loss(at_least_float32(f), at_least_float32(f_t))
    return loss + F.mse_loss(spatial_mean(f.relu()), spatial_mean(f_t.relu())) if pooled else loss


def bridge(source: torch.Size, target: torch.Size, rectified: bool) -> nn.Sequential:
    """From a map ``(B, C, H, W)`` of one network to the shape of the other's.

    Raises:
        InputError: sizes that are neither equal nor differ by a factor of 2.
    """
    (_, c_in, *size), (_, c_out, *wanted) = source, target
    if size == wanted:
        conv: nn.Module = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    elif size == [2 * side for side in wanted]:
        conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    elif wanted == [2 * side for side in size]:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
    else:
        raise InputError(
            f"FCFD bridges maps of one size or of twice the size, not {'x'.join(map(str, size))} and "
            f"{'x'.join(map(str, wanted))}; choose another pair"
        )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    norm = nn.BatchNorm2d(c_out)
    return nn.Sequential(conv, norm, nn.LeakyReLU(0.1)) if rectified else nn.Sequential(conv, norm)


def stages_of(network: nn.Module, facts: NetworkFacts) -> Stages:
    """The network's stages.

    Raises:
        InputError: it does not say how they run.
    """
    try:
        return network.get_stages()
    except (NotImplementedError, AttributeError):
        raise InputError(f"the {facts} does not say by get_stages() how its stages run one by one") from None


@register_distiller("FCFD", DEFAULTS, paper=PAPER, family="feature")
class FCFD(Distiller):
    """Maps that do the same in both networks (:func:`appearance_loss`, and KD of mixed paths)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own, self.seed = cfg.FCFD, cfg.EXPERIMENT.SEED
        self.teacher_batch_statistics = self.own.TEACHER_BATCH_STATISTICS
        found = {}
        for role, network, facts in zip(
            ("student", "teacher"), (student, teacher), self.network_facts(cfg), strict=True
        ):
            stages = stages_of(network, facts)
            with asked(network, (image_side(cfg),) * 2) as image, torch.no_grad():
                found[role] = [f.shape for f in stages.maps(network(image)[1])], stages.rectified
        (shapes_s, rectified_s), (shapes_t, rectified_t) = found["student"], found["teacher"]
        if len(shapes_s) != len(shapes_t):
            raise InputError(
                f"FCFD needs networks with equally many stages: the {self.student_facts} has {len(shapes_s)}, the "
                f"{self.teacher_facts} {len(shapes_t)}; choose another pair"
            )
        self.stages = len(shapes_s)
        self.candidates = [(start, k) for k in range(self.stages - 1) for start in ("student", "teacher")]
        pairs = list(zip(shapes_s, shapes_t, strict=True))
        with generator_kept():
            self.to_teacher = nn.ModuleList(bridge(s, t, rectified_t) for s, t in pairs)
            self.to_student = nn.ModuleList(bridge(t, s, rectified_s) for s, t in pairs[:-1])
        self.steps = StepCounter()

    def forward_train(self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any) -> Any:
        dice = random.Random(
            f"FCFD's paths {self.seed} {self.steps.step()}"
        )  # numbers of the CPU: no step waits for a GPU
        chosen = dice.sample(self.candidates, min(self.own.PATHS, len(self.candidates)))
        logits, parts = self.parts(image, chosen)
        own = self.own
        return logits, {
            "loss_ce": own.CE_WEIGHT * F.cross_entropy(logits, target),
            "loss_kd": own.KD_WEIGHT * parts["kd"],
            "loss_mix": own.MIX_WEIGHT * sum(parts["mix"], zero_of(self.to_student)),
            "loss_l2": own.L2_WEIGHT * warmup(epoch, own.WARMUP) * sum(parts["l2"]),
        }

    def parts(self, image: Tensor, paths: list[Path]) -> tuple[Tensor, dict[str, Any]]:
        """The student's logits and the unweighted terms: ``kd``, a list ``mix`` of paths, a list ``l2`` of stages."""
        stages = {"student": self.student.get_stages(), "teacher": self.teacher.get_stages()}
        logits, features_s = self.student(image)
        with torch.no_grad(), self.statistics():
            logits_t, features_t = self.teacher(image)
        maps_s, maps_t = stages["student"].maps(features_s), stages["teacher"].maps(features_t)
        bridged = [cross(f) for cross, f in zip(self.to_teacher, maps_s, strict=True)]
        in_teacher = [[f] for f in bridged]  # by stage
        mix = []
        for start, k in paths:
            end = "teacher" if start == "student" else "student"
            x = bridged[k] if start == "student" else self.to_student[k](maps_t[k].detach())
            with batch_statistics(self.student) if end == "student" else self.statistics():
                for number in range(k + 1, self.stages):
                    x = stages[end].run[number](x)
                    if end == "teacher":
                        in_teacher[number].append(x)
                path_logits = stages[end].classifier(spatial_mean(x.relu()))
            mix.append(kd_loss(path_logits, logits_t, self.own.TEMPERATURE))
        l2 = [
            sum(appearance_loss(f, f_t, pooled=number == self.stages - 1) for f in found)
            for number, (found, f_t) in enumerate(zip(in_teacher, maps_t, strict=True))
        ]
        return logits, {"kd": kd_loss(logits, logits_t, self.own.TEMPERATURE), "mix": mix, "l2": l2}

    def statistics(self) -> Any:
        """The context in which the teacher computes."""
        return batch_statistics(self.teacher) if self.teacher_batch_statistics else nullcontext()
