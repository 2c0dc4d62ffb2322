"""A method's contract: the parameter names in its signatures say what the method needs. This module reads them once.

The parameters of ``forward_train`` are fields of a batch. The parameters of the constructor are the values that the
builder passes. Nothing else in the library looks at a method's signatures or at a method's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistiller.registry import InputError

ARGUMENTS = ("student", "teacher", "cfg", "num_data")  # parameters of every constructor, in mdistiller's order
FIELDS = ("target", "index", "epoch", "contrastive_index")  # parameters of forward_train besides the views
PREPARE = ["batches", "autocast"]  # a method file of another project may use the name prepare for something else


@dataclass(frozen=True)
class Contract:
    """The inputs that a method's signatures name.

    Args:
        views: the image fields of a batch, ``("image",)`` or ``("image_weak", "image_strong")``; ``("image",)`` if
            ``forward_train`` names no view.
        fields: the fields that ``forward_train`` takes; ``None``: all fields, by ``**kwargs``.
        named: the names of the parameters of ``forward_train``.
        required: the names in ``named`` without a default.
        arguments: the builder's value for each parameter of the constructor that gets a value.
        by_place: the constructor is called with positional arguments, because another project chose its names.
        prepares: the method has a stage before training.
    """

    views: tuple[str, ...]
    fields: frozenset[str] | None
    named: tuple[str, ...]
    required: tuple[str, ...]
    arguments: dict[str, str]
    by_place: bool
    prepares: bool

    @property
    def teacher(self) -> bool:
        """The method has a teacher."""
        return "teacher" in self.arguments.values()

    def inputs(self, batch: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        """The arguments of ``forward_train``: the fields of a batch that it names, and the number of the epoch."""
        everything = {**batch, "epoch": epoch}
        if self.fields is None:
            return everything
        return {name: value for name, value in everything.items() if name in self.fields}

    @property
    def negatives(self) -> bool:
        """``forward_train`` names ``contrastive_index``: positions of images to contrast each image with."""
        return "contrastive_index" in self.named


@functools.cache
def contract_of(method: type) -> Contract:
    """The contract of a method's class.

    Raises:
        InputError: a signature requires an unknown parameter; names the file, the parameter and the known parameters.
    """
    parameters = inspect.signature(method.forward_train).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    views = tuple(p.name for p in named if p.name == "image" or p.name.startswith("image_"))
    required = tuple(p.name for p in named if p.default is p.empty)
    unknown = [name for name in required if name not in views + FIELDS]
    if unknown:
        raise InputError(
            f"{where(method)}: forward_train requires {unknown[0]!r}, which no data set delivers; it can take image, "
            f"image_<view>, {', '.join(FIELDS)}, and parameters with a default"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments, by_place = _constructor(method)
    if "student" not in arguments.values():
        raise InputError(
            f"{where(method)}: the constructor takes no student; it can take {', '.join(ARGUMENTS)}, and must pass "
            "student and teacher to super().__init__(student, teacher)"
        )
    prepare = getattr(method, "prepare", None)
    prepares = prepare is not None and not getattr(prepare, "does_nothing", False)
    return Contract(
        views=views or ("image",),
        fields=None if takes_all else frozenset(p.name for p in named),
        named=tuple(p.name for p in named),
        required=required,
        arguments=arguments,
        by_place=by_place,
        prepares=prepares and list(inspect.signature(prepare).parameters)[1:] == PREPARE,
    )


def check_step(method: type) -> None:
    """Refuse a method without a step.

    Raises:
        InputError: names the file.
    """
    step = getattr(method, "forward_train", None)
    if step is None or getattr(step, "does_nothing", False):
        raise InputError(f"{where(method)}: the class defines no forward_train; see mdistiller/distillers/_base.py")


def _constructor(method: type) -> tuple[dict[str, str], bool]:
    """:attr:`Contract.arguments` and :attr:`Contract.by_place`.

    Parameters are identified by their names. In a class that :func:`~mdistiller.registry.register_distiller` has not
    registered, unknown names are identified by their position: other projects use other names in mdistiller's order.
    """
    parameters = list(inspect.signature(method).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in named if p.default is p.empty]
    known = (*ARGUMENTS, *getattr(method, "networks", {}))
    if not named and any(p.kind is p.VAR_POSITIONAL for p in parameters):  # *args: the base class gets all of them
        return {name: name for name in ARGUMENTS[:3]}, True
    unknown = [p.name for p in required if p.name not in known]
    if not unknown:
        return {p.name: p.name for p in named if p.name in known}, False
    by_keyword = any(p.kind is p.KEYWORD_ONLY for p in required)
    if "declared" in vars(method) or by_keyword or len(required) > len(ARGUMENTS):
        raise InputError(
            f"{where(method)}: the constructor asks for {unknown[0]!r}, which the library does not pass; it can take "
            f"{', '.join(known)}, parameters with a default, and further networks that the class declares: "
            f'networks = {{"{unknown[0]}": "student"}}'
        )
    return dict(zip([p.name for p in required], ARGUMENTS, strict=False)), True


def where(method: type) -> str:
    """File and name of a class, for messages."""
    try:
        return f"{Path(inspect.getfile(method)).name}, {method.__name__}"
    except (TypeError, OSError):  # a class of a notebook or of an interactive session
        return method.__name__
