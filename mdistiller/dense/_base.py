"""The base of the methods for detectors: two records in, named losses out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.options import Option, weight
from mdistiller.registry import InputError, Registry

from .record import DetectorFacts, Record

dense_dict = Registry("method for detectors")
LEVELS = Option(0, "number of the pyramid's levels that are compared, from the finest; 0: all", at_least=0, at_most=16)


def register_dense(name: str, defaults: dict[str, Any] | None = None, *, paper: str = "") -> Callable[[type], type]:
    """Class decorator that enters a method into ``dense_dict``.

    Args:
        name: for ``DISTILLER.TYPE``; also the section of its options below ``DISTILLER``.
        defaults: a nested dictionary of options (:mod:`mdistiller.options`).
        paper: short reference for the listings.
    """

    def register(cls: type) -> type:
        cls.name, cls.defaults, cls.paper = name, defaults or {}, paper
        dense_dict.add(name, cls)
        return cls

    return register


class DenseMethod(nn.Module):
    """Base of all methods. Its modules are trained and saved with the student and are dropped at the end.

    Args:
        own: the method's options.
        student: facts of the student.
        teacher: facts of the teacher.
    """

    name = ""
    defaults: dict[str, Any] = {}  # noqa: RUF012  set by the decorator
    paper = ""
    has_teacher = True
    virtual_view = False
    """Whether the student and the teacher are also run on a view with other colours."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts | None) -> None:
        super().__init__()

    def forward(self, student: Record, teacher: Record) -> dict[str, Tensor]:
        """The weighted losses by name, ``()`` each. Gradient flows through the student's record."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def parameter_rates(self, rate: float) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters that have their own learning rate and no weight decay; ``rate`` is the run's."""
        return []

    def levels(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> int:
        """The number of levels that are compared: ``LEVELS``, or all.

        Raises:
            InputError: a network has fewer levels.
        """
        most = min(len(student.widths), len(teacher.widths))
        if most < own.LEVELS:
            raise InputError(f"DISTILLER.{self.name}.LEVELS is {own.LEVELS}, and the networks have {most} levels")
        return own.LEVELS or most


@register_dense("NONE")
class Plain(DenseMethod):
    """Plain training: the detector's own losses."""

    has_teacher = False

    def forward(self, student: Record, teacher: Record | None = None) -> dict[str, Tensor]:
        return {}


class Aligned(DenseMethod):
    """Base of methods that compare maps after a 1x1 convolution with bias on the student's, one for each level."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        widths = list(zip(student.widths, teacher.widths, strict=True))[: self.levels(own, student, teacher)]
        self.align = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in widths)

    def pairs(self, student: Record, teacher: Record) -> list[tuple[Tensor, Tensor]]:
        """The aligned maps of the student and the teacher's maps, level by level, the finest first."""
        return [(align(s), t) for align, s, t in zip(self.align, student.maps, teacher.maps, strict=False)]


class Direct(DenseMethod):
    """Base of methods that compare the maps as they are: both networks need the same widths."""

    def __init__(self, own: Any, student: DetectorFacts, teacher: DetectorFacts) -> None:
        super().__init__(own, student, teacher)
        self.count = self.levels(own, student, teacher)
        if student.widths[: self.count] != teacher.widths[: self.count]:
            raise InputError(
                f"{self.name} compares the pyramids' maps as they are, and their widths differ: student "
                f"{student.widths[0]}, teacher {teacher.widths[0]}; set MODEL.FPN.OUT_CHANNELS {teacher.widths[0]}"
            )

    def pairs(self, student: Record, teacher: Record) -> list[tuple[Tensor, Tensor]]:
        """The maps of student and teacher, level by level, the finest first."""
        return list(zip(student.maps, teacher.maps, strict=True))[: self.count]


def compared(logits: Tensor) -> bool:
    """Whether there is a box to compare: a batch may have none."""
    return len(logits) > 0


def loss_weight(default: float) -> dict[str, Option]:
    return {"WEIGHT": weight(default, "of the loss beside the detector's own losses")}


class StepCount(nn.Module):
    """Counts training steps; the count is saved with the run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def forward(self) -> Tensor:
        """The number of steps before this one, ``()``."""
        before = self.done.clone()
        self.done += 1
        return before
