"""X+KD for every method X: ``DISTILLER.ADD_KD`` is the weight of a KD term beside the method's own losses.

The method's file needs no change. Hooks record the calls of ``student`` and ``teacher`` while the distiller runs. The
recorded calls contain the logits of the batch's views:

- the term is the sum over the batch's views (``image``, or ``image_weak`` and ``image_strong``) of
  :func:`~mdistiller.distillers.KD.kd_loss`; a view that the student never sees has no term;
- images that the method adds (rotated or mixed copies) have no term, even if one call contains them and a view;
- if several calls contain one view, the student's first call with a gradient counts, and the teacher's first call;
- the teacher runs again only for views that the method did not show it in eval mode (OFD normalises by the batch); its
  logits are constant.

A view is found in the calls by a comparison of images, once for each set of batch sizes. So a method must call its
networks in the same way in all steps with equal batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers.KD import kd_loss
from mdistiller.registry import InputError

from .batch import images_of
from .forwards.chain import put
from .forwards.listen import listen

TERM = "loss_added_kd"

Call = tuple[Tensor, Tensor]  # a network's input (M, 3, H, W) and its logits (M, K)
Place = tuple[int, slice]  # number of the call, and the view's rows in it


def add_kd(distiller: nn.Module, weight: float, temperature: float) -> None:
    """Add the term ``loss_added_kd`` to a method's losses in training.

    Args:
        distiller: a method with a student and a teacher.
        weight: of the term.
        temperature: T > 0, for all views.
    """
    added = AddedKD(weight, temperature)
    distiller.register_forward_pre_hook(added.listen)
    distiller.register_forward_hook(added.add, with_kwargs=True)


class AddedKD:
    """The term's hooks on a distiller."""

    def __init__(self, weight: float, temperature: float) -> None:
        self.weight, self.temperature = weight, temperature
        self.calls: dict[str, list[Call]] = {}
        self.listening: list[Callable[[], None]] = []
        self.places: dict[Any, tuple[list[Place | None], list[Place | None]]] = {}

    def listen(self, distiller: nn.Module, args: Any) -> None:
        """Before the distiller runs."""
        self._stop()  # after a step that failed
        if distiller.training:
            for role in ("student", "teacher"):
                network = getattr(distiller, role)
                link = listen(partial(_keep, self.calls.setdefault(role, []), network if role == "teacher" else None))
                self.listening.append(put(network, "listen", link))

    def add(self, distiller: nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> Any:
        """After the distiller ran: its logits, and its losses with the new term."""
        if not distiller.training:
            return output
        student, teacher = self._stop()
        logits, losses = output
        views = images_of(kwargs)
        if not student and len(views) == 1:  # the method runs the student's parts, so no call is recorded
            student = [(views[0], logits)]
        key = tuple(tuple(len(images) for images, *_ in part) for part in (zip(views), student, teacher))
        if key not in self.places:
            self.places[key] = [_find(view, student) for view in views], [_find(view, teacher) for view in views]
        of_student, of_teacher = self.places[key]
        pairs = [
            (_logits_at(place, student), self._teacher_logits(distiller, view, other, teacher))
            for view, place, other in zip(views, of_student, of_teacher, strict=True)
            if place is not None
        ]
        if not pairs:
            raise InputError(
                f"DISTILLER.ADD_KD: {type(distiller).__name__} never calls its student with the unchanged images of "
                "the batch, so KD cannot be added; set DISTILLER.ADD_KD to 0"
            )
        term = sum(kd_loss(of_s, of_t, self.temperature) for of_s, of_t in pairs)
        return logits, {**losses, TERM: self.weight * term}

    def _stop(self) -> tuple[list[Call], list[Call]]:
        """Stop recording and return the recorded calls."""
        while self.listening:
            self.listening.pop()()
        calls, self.calls = self.calls, {}
        return calls.get("student", []), calls.get("teacher", [])

    @staticmethod
    def _teacher_logits(distiller: nn.Module, view: Tensor, place: Place | None, calls: list[Call]) -> Tensor:
        if place is not None:
            return _logits_at(place, calls).detach()
        with torch.no_grad():
            return _logits_of(distiller.teacher(view))


def _keep(calls: list[Call], frozen: nn.Module | None, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Record a call. A frozen network's call counts only if all of the network is in eval mode."""
    if frozen is not None and any(module.training for module in frozen.modules()):
        return
    images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    calls.append((images, _logits_of(output)))


def _logits_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _logits_at(place: Place, calls: list[Call]) -> Tensor:
    number, rows = place
    return calls[number][1][rows]


def _find(view: Tensor, calls: list[Call]) -> Place | None:
    """Find a view's images in the calls: consecutive rows or rows at even distances. Calls with gradient come first."""
    matches = []
    for number, (images, logits) in enumerate(calls):
        copies, rest = divmod(len(images), len(view))
        if rest or images.shape[1:] != view.shape[1:] or images.dtype != view.dtype:
            continue
        blocks = [slice(copy * len(view), (copy + 1) * len(view)) for copy in range(copies)]
        for rows in blocks + [slice(copy, None, copies) for copy in range(copies)]:
            if images is view or torch.equal(images[rows], view):
                matches.append((not logits.requires_grad, number, rows))
                break
    return min(matches, key=lambda match: match[:2])[1:] if matches else None
