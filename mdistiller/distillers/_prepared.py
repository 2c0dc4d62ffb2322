"""Stages before training that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.options import MANY, Option

from ._common import FeatureDistiller

Batches = Callable[[int], Iterator[dict[str, Tensor]]]


def preparation_options(epochs: int, lr: float, decay_stages: tuple[int, ...] = ()) -> dict[str, Option]:
    """The section ``PREPARE`` of a method with a stage before training. ``LR`` 0 means ``SOLVER.LR``."""
    return {
        "EPOCHS": Option(epochs, "epochs of the stage before training", at_least=0, at_most=MANY),
        "LR": Option(lr, "learning rate of the stage; 0: SOLVER.LR", at_least=0),
        "LR_DECAY_STAGES": Option(decay_stages, "epochs after which the stage's rate is divided by 10", at_least=0),
        "MOMENTUM": Option(0.9, "momentum of the stage", at_least=0, below=1),
        "WEIGHT_DECAY": Option(5e-4, "weight decay of the stage", at_least=0),
    }


def minimise(
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    parameters: Iterable[nn.Parameter],
    batches: Batches,
    settings: Any,
    lr: float,
    nesterov: bool = False,
) -> dict[str, float]:
    """Train parameters by SGD on a loss of their own, in a stage before training.

    Args:
        loss_of: the loss ``()`` of a batch.
        parameters: that are trained. A parameter without gradient stays as it is.
        batches: gives the batches of an epoch, from 1.
        settings: the section of :func:`preparation_options`.
        lr: ``SOLVER.LR``, for ``LR`` 0.
        nesterov: Nesterov's momentum.

    Returns:
        ``{"loss": mean over the images of the last epoch}``; empty without epochs.
    """
    trained, lr = list(parameters), settings.LR or lr
    rate = {"lr": lr, "momentum": settings.MOMENTUM, "weight_decay": settings.WEIGHT_DECAY}
    optimizer = torch.optim.SGD(trained, **rate, nesterov=nesterov)
    facts: dict[str, float] = {}
    for epoch in range(1, settings.EPOCHS + 1):
        passed = sum(epoch > stage for stage in settings.LR_DECAY_STAGES)
        optimizer.param_groups[0]["lr"] = lr * 0.1**passed
        total, images = torch.zeros((), dtype=torch.float64, device=trained[0].device), 0
        for batch in batches(epoch):
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total = total + len(batch["target"]) * loss.detach().double()
            images += len(batch["target"])
        facts = {"loss": (total / images).item()}
    optimizer.zero_grad(set_to_none=True)
    return facts


class StartedByDistance(FeatureDistiller):
    """A distance of the features trains the student before training; then the cross-entropy trains the student.

    The section has ``PREPARE`` (:func:`preparation_options`). With ``LOSS.FEAT_WEIGHT`` above 0 the distance stays in
    training.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.prepare_settings, self.lr = cfg[self.section].PREPARE, cfg.SOLVER.LR

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.feat_weight:
            return super().forward_train(image, target)
        logits, _ = self.student(image)
        return logits, {"loss_ce": self.ce_weight * F.cross_entropy(logits, target)}

    def prepare(self, batches: Batches, autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """Minimise the distance. The result depends on the student, so that each run has its own."""

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            with autocast():
                with torch.no_grad():
                    _, features_teacher = self.teacher(batch["image"])
                _, features_student = self.student(batch["image"])
                return self.distance(features_student, features_teacher)

        return minimise(loss_of, self.get_learnable_parameters(), batches, self.prepare_settings, self.lr)
