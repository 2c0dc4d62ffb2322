"""The base of all methods: a module that holds the networks and turns a batch into named losses.

A method defines ``__init__`` and ``forward_train``. The names of their parameters say what the method needs
(:mod:`mdistiller.contract`):

- ``__init__(self, student, teacher, cfg)`` builds the method. It may also name ``num_data``, the number of training
  images, and the further networks that the class declares (:attr:`Distiller.networks`). Only named parameters are
  passed.
- ``forward_train(self, image, target, **kwargs)`` returns ``(student logits, {name: loss})``. ``image`` is the data
  set's weak view; ``image_weak, image_strong`` are two views of the same images; ``index`` is the position of each
  image in the training set; ``contrastive_index`` holds the positions of each image's positive and negatives;
  ``epoch`` counts from 1. Only named parameters are passed. ``**kwargs`` gets the whole batch and ``epoch``.
- ``target`` are class numbers ``(B,)``. A method with ``mixed_labels = True`` also takes shares ``(B, K)`` that sum
  to 1, as MixUp, CutMix and label smoothing make them; cross-entropies take both.

All other parts are optional attributes and methods of :class:`Distiller`, each with a default and a docstring.

With several processes, ``forward_train`` gets the process's own images, or with ``SOLVER.GATHER`` the images of all.
A method that always needs all images gathers them by ``mdistiller/functional/gather.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.facts import NetworkFacts, facts_of
from mdistiller.registry import distiller_dict, image_side


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
        name: the method's name for ``DISTILLER.TYPE``.
        defaults: the method's configuration, a nested dictionary of options (:mod:`mdistiller.options`) or plain
            values; ``None`` for no options.
        section: the config section of ``defaults``, by default ``name``. Methods may share a section.
        paper: short reference for the listings, ``"Hinton et al., NIPS 2014 workshop, arXiv:1503.02531"``.
        family: ``"logit"``, ``"feature"``, ``"relation"`` or empty.
        weights: keys of plain values in ``defaults`` that are weights of the method's own terms although their names do
            not end in ``_WEIGHT`` (a paper's ``ALPHA``); nested keys with dots. Options made by
            :func:`mdistiller.options.weight` are weights by themselves.
    """

    def register(cls: type) -> type:
        cls.defaults, cls.section = defaults, section or name
        cls.paper, cls.family, cls.weights = paper, family, weights
        cls.declared = True  # its constructor's arguments count by name, see mdistiller/contract.py
        distiller_dict.add(name, cls)
        return cls

    return register


class Distiller(nn.Module):
    """Base of all methods: student, frozen teacher, and the interface of the trainer.

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
    """Whether ``target`` may hold shares of classes."""
    reads_teacher_logits = True
    """Whether the method reads the teacher's logits. If not, the teacher may be one of other classes."""
    standardises_logits = False
    """Whether the method supports ``EXPERIMENT.LOGIT_STAND``."""
    networks: ClassVar[dict[str, str]] = {}
    """Further networks and their roles. ``{"peer": "student"}`` adds the keys ``DISTILLER.PEER`` and
    ``DISTILLER.PEER_CKPT`` and the constructor's argument ``peer``. A ``"student"`` starts from fresh weights unless
    its file is named; a ``"teacher"`` needs a file and is frozen. An empty key means the student's or teacher's own
    architecture. The constructor keeps each network as an attribute of the same name."""
    student_images_per_sample = 1
    """How many images the student takes for each image of the batch. A method that makes copies has more than one."""
    teacher_batch_statistics = False
    """Whether the method runs its teacher on the statistics of the batch."""
    student_facts: NetworkFacts | None = None
    """:meth:`network_facts` sets this and ``teacher_facts``."""
    teacher_facts: NetworkFacts | None = None

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.monitors: dict[str, Tensor] = {}
        """Detached scalars ``()`` besides the losses. ``forward_train`` fills them; the log has their means over an
        epoch's images as ``monitor/<name>``."""
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    def train(self, mode: bool = True) -> Distiller:
        """Switch the mode of all modules but the frozen networks: their BatchNorm statistics must not change."""
        super().train(mode)
        for network in self.frozen_networks().values():
            network.eval()
        return self

    def forward_train(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Student logits ``(B, K)`` and the weighted losses by name. Training minimises their sum."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_train")

    forward_train.does_nothing = True

    def forward_test(self, image: Tensor) -> Tensor:
        """Logits ``(B, K)`` of the deployed network."""
        output = self.deployed()(image)
        return output[0] if isinstance(output, tuple) else output

    def forward(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]] | Tensor:
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])

    def deployed(self) -> nn.Module:
        """The network that is scored, averaged, saved as the student and exported; the student by default.

        A method that predicts by its own head returns a network that holds student and head. If a class defines
        ``forward_test`` but not ``deployed``, the whole method is deployed (``mdistiller/engine/deployed.py``).
        """
        return self.student

    def network_facts(self, cfg: Any) -> tuple[NetworkFacts, NetworkFacts]:
        """Facts of student and teacher: shapes of their maps, stages, widths, classes, and more.

        The first call runs each network on one black image of the run's size (:func:`facts_of`). The facts are kept as
        ``student_facts`` and ``teacher_facts``.

        Raises:
            InputError: a network fails on such an image, or its result is not ``(logits, features)``.
        """
        if self.student_facts is None:
            size = (image_side(cfg),) * 2
            self.student_facts = facts_of(self.student, size, "student")
            self.teacher_facts = facts_of(self.teacher, size, "teacher")
        return self.student_facts, self.teacher_facts

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The networks that stay in eval mode and are not saved, by attribute; the teachers by default."""
        names = ["teacher", *(name for name, role in type(self).networks.items() if role == "teacher")]
        return {name: network for name in names if (network := getattr(self, name, None)) is not None}

    def teacher_parameters(self) -> list[nn.Parameter]:
        """The parameters of frozen networks that the method trains; none by default."""
        return []

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The optimiser's parameters: every trainable parameter outside frozen networks, and ``teacher_parameters()``.

        mdistiller's base returns the student's parameters only, and each method adds its own modules. An override of
        that kind works here too: the optimiser takes each parameter once.
        """
        frozen = {id(p) for network in self.frozen_networks().values() for p in network.parameters()}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in frozen]
        return own + self.teacher_parameters()

    def get_extra_parameters(self) -> int:
        """Number of trained elements that the method adds to the student's."""
        student = {id(p) for p in self.student.parameters()}
        return sum(p.numel() for p in self.get_learnable_parameters() if id(p) not in student)

    def parameter_groups(self, cfg: Any) -> list[dict[str, Any]]:
        """The optimiser's groups; one may have its own ``lr``. By default one group of all learnable parameters."""
        return [{"params": self.get_learnable_parameters()}]

    def on_epoch_start(self, epoch: int) -> None:
        """Called before each epoch, counted from 1."""

    def prepare(
        self, batches: Callable[[int], Iterator[dict[str, Tensor]]], autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, Any] | None:
        """A stage before training that changes the method's modules; ``mdistiller/engine/prepare.py`` runs it.

        Args:
            batches: ``batches(epoch)`` gives the batches of an epoch, as ``forward_train`` gets them.
            autocast: ``autocast()`` is the context for the networks.

        Returns:
            Facts for ``results.json``, or ``None``.
        """

    prepare.does_nothing = True

    def preparation(self) -> tuple[nn.Module, dict[str, Any]] | None:
        """The module that holds the result of :meth:`prepare`, and the method's settings on which the result depends.

        With them the result is kept for other runs. ``None``: the stage runs each time.
        """
        return None


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

    This is the baseline of methods with two views, since it sees the same images. The student takes one view after the
    other, so that BatchNorm does not mix their statistics.
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
