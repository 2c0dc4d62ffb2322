"""A detector with its teacher and a method for records, as the trainer takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from mdistiller.dense import DenseMethod
from mdistiller.distillers import Distiller

from .adapter import boxes_pass, normalised, other_colours, pixels, seen_by, student_pass, teacher_pass


class DetectionDistiller(Distiller):
    """The student's own losses and those of the method.

    The teacher is no module of this one: it stays in eval mode, and is neither saved nor moved. What a method trains of
    it is part of the method. Each view passes the student's box head once.

    Args:
        student: the detector.
        teacher: on its device; ``None`` for plain training.
        method: takes the records; ``None`` for plain training.
    """

    def __init__(
        self, student: FasterRCNN, teacher: FasterRCNN | None = None, method: DenseMethod | None = None
    ) -> None:
        super().__init__(student)
        self.method = method
        vars(self)["outside"] = teacher
        if teacher is not None:
            own = set() if method is None else {id(p) for p in method.parameters()}
            for parameter in teacher.parameters():
                parameter.requires_grad_(id(parameter) in own)
            teacher.eval()

    def forward_train(
        self, image: list[Tensor], target: list[dict[str, Tensor]], **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            image: ``(3, H, W)`` each, red first, 0 to 1.
            target: see :func:`~mdistiller.detection.adapter.student_pass`.
            kwargs: further fields of the batch.

        Returns:
            Class logits of the sampled boxes ``(P, C + 1)``, background last, and the losses.
        """
        student, losses, batch = student_pass(self.student, image, target)
        teacher_network = self.outside
        if teacher_network is None:
            return student.class_logits, losses
        if hasattr(self.method, "hold_teacher"):
            self.method.hold_teacher()
        teacher = teacher_pass(teacher_network, seen_by(teacher_network, self.student, batch), student)
        if self.method.virtual_view:
            view, sizes = other_colours(pixels(self.student, batch)), batch.image_sizes
            _, of_student, _ = boxes_pass(self.student, normalised(self.student, view, sizes), student.boxes)
            with torch.no_grad():
                _, of_teacher, _ = boxes_pass(teacher_network, normalised(teacher_network, view, sizes), student.boxes)
            student, teacher = replace(student, virtual_logits=of_student), replace(teacher, virtual_logits=of_teacher)
        return student.class_logits, losses | self.method(student, teacher)

    def parameter_groups(self, cfg: Any) -> list[dict[str, Any]]:
        """All trained parameters, and with their own rate and no weight decay those that the method names."""
        rated = [] if self.method is None else self.method.parameter_rates(cfg.SOLVER.LR)
        apart = {id(p) for parameters, _ in rated for p in parameters}
        groups = [{"params": [p for p in self.get_learnable_parameters() if id(p) not in apart]}]
        return groups + [{"params": own, "lr": rate, "weight_decay": 0.0} for own, rate in rated]
