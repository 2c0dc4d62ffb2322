"""HSAKD: hierarchical self-supervision augmented knowledge distillation, joint labels of class and rotation.

Yang, An, Cai, Xu. Hierarchical Self-supervised Augmented Knowledge Distillation. IJCAI 2021. arXiv:2107.13715. Shapes:
B images, each turned by 0, 90, 180 and 270 degrees; K classes.

Each network gets an auxiliary branch behind each stage's map: the later stages once more, with weights of their own,
mean over positions, and a linear classifier of the joint label ``4 class + rotation`` (4 K classes; ``get_tails`` of a
network gives the stages). Before training, the teacher's branches learn the joint labels; the teacher itself does not
change (``PREPARE``; the result is kept for other students). Then, on all 4 B rotated images, the loss is the sum over
branches of ``T^2 KL`` of student's and teacher's branches, and ``T^2 KL`` of the logits (:func:`branch_loss`), beside
the cross-entropy on the images. The student's branches have no loss on labels, and are dropped after training.

Not here: the paper's second way, which trains the teacher with its branches from scratch, and so another teacher. The
authors pick the best epoch of the first stage by its accuracy on the test set; here the last counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, draws, gradient_in_layout, spatial_mean
from mdistiller.functional.mixing import class_numbers
from mdistiller.functional.rotations import QUARTERS, rotations
from mdistiller.models.facts import NetworkFacts
from mdistiller.options import Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import generator_kept
from ._prepared import Batches, minimise, preparation_options
from .KD import kd_loss

DEFAULTS = {
    "T": Option(3.0, "the temperature", above=0),
    "PREPARE": preparation_options(epochs=100, lr=0.05, decay_stages=(30, 60, 90)),
    "LOSS": {
        "CE_WEIGHT": weight(1.0, "of the cross-entropy"),
        "KD_WEIGHT": weight(1.0, "of KD on images and copies"),
        "BRANCH_WEIGHT": weight(1.0, "of the branches"),
    },
}
PAPER = "Yang et al., IJCAI 2021, arXiv:2107.13715"

BRANCH_KEY = 6  # key of the seed for the initial weights of the teacher's branches


def joint_labels(target: Tensor) -> Tensor:
    """``(4 B,)``: ``4 class + rotation`` of the images, then of each of their rotations, for classes ``(B,)``."""
    return torch.cat([QUARTERS * target + quarters for quarters in range(QUARTERS)])


def branch_loss(branches_s: Sequence[Tensor], branches_t: Sequence[Tensor], temperature: float) -> Tensor:
    """``sum over branches of T^2 KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the rows.

    Args:
        branches_s: logits ``(4 B, 4 K)`` of the student's branches, shallow to deep; gradient flows.
        branches_t: of the teacher's, the same number; constant.
        temperature: T > 0.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: logits of different shapes.
        ValueError: lists of different length.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> branch_loss([student, student], [teacher, student], temperature=4.0)
        tensor(1.7751)
    """
    pairs = zip(branches_s, branches_t, strict=True)
    return sum(kd_loss(s, t.detach(), temperature) for s, t in pairs)


class Branches(nn.Module):
    """A network's auxiliary branches."""

    def __init__(self, network: nn.Module, facts: NetworkFacts) -> None:
        super().__init__()
        try:
            found = network.get_tails()
        except (AttributeError, NotImplementedError):
            raise InputError(
                f"HSAKD repeats the stages of its networks, and the {facts} does not offer them by get_tails(): see "
                "mdistiller/models/_features.py; choose another network or method"
            ) from None
        self.maps = [number for number, _ in found]
        self.tails = nn.ModuleList(tail for _, tail in found)
        self.classifiers = nn.ModuleList()
        like = next(network.parameters())
        for number, tail in found:
            with torch.no_grad():
                tail.eval().to(like.device, like.dtype)
                width = tail(like.new_zeros(facts.shapes[number])).shape[1]
            self.classifiers.append(nn.Linear(width, QUARTERS * facts.classes))
        self.to(like.device, like.dtype)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the joint labels, from all maps of the network."""
        last = [tail(gradient_in_layout(maps[number])) for number, tail in zip(self.maps, self.tails, strict=True)]
        pooled = [spatial_mean(gradient_in_layout(x)) for x in last]
        with torch.autocast(pooled[0].device.type, enabled=False):
            return [classify(x) for classify, x in zip(self.classifiers, pooled, strict=True)]


@register_distiller("HSAKD", DEFAULTS, paper=PAPER, family="logit")
class HSAKD(Distiller):
    """KD of logits and of auxiliary branches that tell class and rotation (:func:`branch_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own, self.lr = cfg.HSAKD, cfg.SOLVER.LR
        of_student, of_teacher = self.network_facts(cfg)
        self.student_branches = Branches(student, of_student)
        with generator_kept(int(draws.hash_keys(cfg.EXPERIMENT.SEED, BRANCH_KEY))):  # the same for each student
            self.teacher_branches = Branches(teacher, of_teacher).requires_grad_(False)
        ours, theirs = (len(branches.maps) for branches in (self.student_branches, self.teacher_branches))
        if ours != theirs:
            raise InputError(
                f"HSAKD pairs the branches of both networks; the {of_student} has {ours}, the {of_teacher} {theirs}"
            )

    def train(self, mode: bool = True) -> HSAKD:
        super().train(mode)
        self.teacher_branches.eval()
        return self

    @property
    def student_images_per_sample(self) -> int:
        """Without weights of the method's own terms there are no copies."""
        return QUARTERS if self.own.LOSS.KD_WEIGHT or self.own.LOSS.BRANCH_WEIGHT else 1

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        weights, images = self.own.LOSS, len(image)
        copies = self.student_images_per_sample > 1
        shown = rotations(image) if copies else image
        logits_s, features_s = self.student(shown)
        losses = {"loss_ce": weights.CE_WEIGHT * F.cross_entropy(logits_s[:images], target)}
        if copies:
            with torch.no_grad():
                logits_t, features_t = self.teacher(shown)
                branches_t = self.teacher_branches(features_t["feats"])
            branches_s = self.student_branches(features_s["feats"])
            losses["loss_kd"] = weights.KD_WEIGHT * kd_loss(logits_s, logits_t, self.own.T)
            losses["loss_branches"] = weights.BRANCH_WEIGHT * branch_loss(branches_s, branches_t, self.own.T)
        return logits_s[:images], losses

    def prepare(self, batches: Batches, autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """Train the teacher's branches on the joint labels."""

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            with autocast():
                with torch.no_grad():
                    _, features = self.teacher(rotations(batch["image"]))
                branches = self.teacher_branches(features["feats"])
                labels = joint_labels(class_numbers(batch["target"]))
                return sum(F.cross_entropy(at_least_float32(logits), labels) for logits in branches)

        self.teacher_branches.requires_grad_(True).train()
        try:
            trained = self.teacher_branches.parameters()
            return minimise(loss_of, trained, batches, self.own.PREPARE, self.lr, nesterov=True)
        finally:
            self.teacher_branches.requires_grad_(False).eval()

    def preparation(self) -> tuple[nn.Module, dict[str, Any]]:
        """The teacher's branches, and the settings on which they depend. They also depend on teacher, data and seed."""
        if self.student_images_per_sample == 1:
            return nn.Identity(), {}  # no term uses the branches
        return self.teacher_branches, {**self.own.PREPARE, "LR": self.own.PREPARE.LR or self.lr}
