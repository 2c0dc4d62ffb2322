"""What a method is: a module that holds the networks and turns a batch into named losses.

The contract, which the trainer reads off the signatures and nothing else:

- ``__init__(self, student, teacher, cfg)`` builds what the method needs; a further parameter
  ``num_data`` is given the number of training images, one left out is not passed.
- ``forward_train(self, image, target, **kwargs)`` returns ``(student logits, {name: loss})``. The names
  of its parameters say what a batch must hold: ``image`` is the data set's weak view, ``image_weak,
  image_strong`` are two views of the same images, ``index`` is the position of each image in the training
  set, ``contrastive_index`` a row of positions to contrast it with. ``epoch`` counts from 1. What is not named
  is not passed, unless there is a ``**kwargs``, which takes ``index`` and ``epoch`` always.
- ``target`` are class numbers ``(B,)``. A method that says ``mixed_labels = True`` can also be given shares ``(B, K)``
  that sum to 1, as MixUp, CutMix and label smoothing make them; cross-entropies take both.
- Everything trainable is a parameter of the module and is optimised with the student, unless
  ``get_learnable_parameters`` says otherwise.

Optional: ``parameter_groups(cfg)`` (groups with their own ``lr``), ``teacher_parameters()`` (what of the
teacher a method trains), ``on_epoch_start(epoch)``, and a stage of its own before training: ``prepare(batches,
autocast)``, with ``preparation()`` if the result is to be kept for other runs; ``mdistiller/engine/prepare.py`` says
what they are given and give back. ``student_images_per_sample``: how many images go through the student for each
image of the batch, where the method makes rotated or mixed copies, so that ``images_seen`` is true. ``teacher_batch_statistics``:
whether it runs its teacher on the statistics of the batch. ``forward_train`` may fill ``self.monitors`` with scalars to
watch that are no losses, detached; the log has their means over an epoch's images as ``monitor/<name>``. A class method
``logit_stand_options(cfg, base_temp, kd_weight)`` says that the method heeds ``EXPERIMENT.LOGIT_STAND``, and which
``[KEY, VALUE, ...]`` LSKD's flags stand for; ``base_temp`` is ``None`` where it was not given.

Where several processes train, ``forward_train`` gets the process's own images, or those of all with ``SOLVER.GATHER``.
What a method always wants of all images it gathers by ``mdistiller/functional/gather.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.registry import distiller_dict


def register_distiller(
    name: str,
    defaults: dict[str, Any] | None = None,
    *,
    section: str | None = None,
    paper: str = "",
    family: str = "",
    weights: tuple[str, ...] = (),
) -> Callable[[type], type]:
    """Class decorator that enters a method into ``distiller_dict`` and its defaults into the config.

    Args:
        name: what ``DISTILLER.TYPE`` calls it.
        defaults: the method's configuration, a nested dictionary; ``None`` for a method without any.
        section: the config section that holds ``defaults``; ``name`` where not given. Methods may share one.
        paper: short reference for the listings, ``"Hinton et al., NIPS 2014 workshop, arXiv:1503.02531"``.
        family: ``"logit"``, ``"feature"``, ``"relation"`` or empty.
        weights: keys of ``defaults`` that weight the method's own terms without ending in ``_WEIGHT`` (a paper's
            ``ALPHA``), dotted where nested; the tests switch the terms on and off by them.
    """

    def register(cls: type) -> type:
        cls.defaults, cls.section = defaults, section or name
        cls.paper, cls.family, cls.weights = paper, family, weights
        distiller_dict.add(name, cls)
        return cls

    return register


class Distiller(nn.Module):
    """Base of all methods: student, frozen teacher, and what the trainer asks of them.

    Args:
        student: ``student(image) -> (logits, features)``.
        teacher: the same, or ``None``. Its parameters are frozen and it stays in eval mode.
    """

    defaults: dict[str, Any] | None = None
    section = ""
    paper = ""
    family = ""
    weights: tuple[str, ...] = ()
    mixed_labels = False
    student_images_per_sample = 1
    teacher_batch_statistics = False

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.monitors: dict[str, Tensor] = {}
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    def train(self, mode: bool = True) -> Distiller:
        """Switch everything but the teacher, whose BatchNorm statistics must not move."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets: every trainable parameter outside the teacher, and ``teacher_parameters()``.

        mdistiller's base returns the student's only and each method adds its own modules; doing so on top
        of this is harmless, the optimiser takes each parameter once.
        """
        frozen = set() if self.teacher is None else {id(p) for p in self.teacher.parameters()}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in frozen]
        return own + self.teacher_parameters()

    def teacher_parameters(self) -> list[nn.Parameter]:
        """The teacher's parameters that the method trains; none by default."""
        return []

    def get_extra_parameters(self) -> int:
        """Number of trained elements that the method adds to the student's."""
        student = {id(p) for p in self.student.parameters()}
        return sum(p.numel() for p in self.get_learnable_parameters() if id(p) not in student)

    def forward_train(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Student logits ``(B, K)`` and the losses by name, weighted; their sum is what is minimised."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_train")

    def forward_test(self, image: Tensor) -> Tensor:
        """Student logits ``(B, K)``."""
        return self.student(image)[0]

    def forward(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]] | Tensor:
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])


@register_distiller("NONE")
class Vanilla(Distiller):
    """Plain training: cross-entropy on the labels, no teacher."""

    mixed_labels = True

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student(image)
        return logits, {"ce": F.cross_entropy(logits, target)}


@register_distiller("NONE_TWO_VIEWS")
class VanillaTwoViews(Vanilla):
    """Plain training on a weak and a strong view: the sum of both cross-entropies.

    What methods with two views must be compared with: it sees the same images. Each view goes through the
    student on its own, so that BatchNorm doesn't mix their statistics.
    """

    def forward_train(
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_weak, _ = self.student(image_weak)
        logits_strong, _ = self.student(image_strong)
        return logits_weak, {
            "ce_weak": F.cross_entropy(logits_weak, target),
            "ce_strong": F.cross_entropy(logits_strong, target),
        }
