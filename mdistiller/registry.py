"""The tables everything is looked up in by name, and the errors that end a command with a message.

This module imports nothing of the package, so that every other module may import it. The tables are
dictionaries: ``distiller_dict["KD"]`` is the class, and both ways of adding an entry work, the
decorators of the packages and plain assignment (``distiller_dict["MINE"] = Mine``).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import Any


class InputError(ValueError):
    """A mistake in what the user gave: configuration, command line, data or files.

    The commands in ``tools/`` print its message and exit with code 2, without a traceback; any other
    exception is a fault of ours and keeps its traceback. The message says what was found, what is
    allowed and what to do.
    """


class RunError(RuntimeError):
    """A run that began and could not go on: its numbers, or its disk.

    The commands print its message and exit with code 1, without a traceback.
    """


class UnknownName(InputError, KeyError):
    """A name that a table does not hold. Also a ``KeyError``, because tables are dictionaries."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


SHORT_LIST = 8  # so many names are all shown


def closest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The allowed names most like ``name``, best first; letter case is ignored."""
    by_lower: dict[str, str] = {}
    for candidate in allowed:
        by_lower.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[match] for match in found]


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """``"closest: A, B"``, and everything allowed where that is short or nothing is close."""
    allowed = sorted(allowed)
    near = closest(name, allowed)
    between = "; " if any("," in known for known in allowed) else ", "
    parts = ["closest: " + between.join(near)] if near else []
    if not near or len(near) < len(allowed) <= SHORT_LIST:
        parts.append("known: " + (between.join(allowed) or "none"))
    return "; ".join(parts)


def check_choice(key: str, value: Any, allowed: Iterable[str]) -> Any:
    """``value``, if it is one of those allowed for an option.

    Raises:
        InputError: it is not.
    """
    if value not in allowed:
        raise InputError(f"{key}: no {value!r}; {suggestion(str(value), allowed)}")
    return value


def _origin(entry: Any) -> Any:
    """Module and name of a class or function; a cell of a notebook that is run twice keeps both."""
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", entry)


class Registry(dict):
    """A dictionary from names to things of one kind, whose missing key says what is close.

    Args:
        kind: what an entry is, for messages: ``"distiller"``.

    ``finder`` is asked for a name that is missing, and may enter it; it returns the entry or ``None``. ``advice`` ends
    the refusal of a name.
    """

    finder: Callable[[str], Any] | None = None
    advice = ""

    def __init__(self, kind: str, entries: dict[str, Any] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def __missing__(self, name: str) -> Any:
        found = self.finder(name) if self.finder is not None else None
        if found is not None:
            return found
        raise UnknownName(self.refusal(name))

    def refusal(self, name: Any) -> str:
        """The message for a name that is missing."""
        return "; ".join(filter(None, [f"no {self.kind} named {name!r}", suggestion(str(name), self), self.advice]))

    def add(self, name: str, entry: Any) -> None:
        """Enter ``entry``; another one of the same name is refused, unless it is the same definition run again."""
        if name in self and self[name] is not entry and _origin(self[name]) != _origin(entry):
            raise ValueError(f"{self.kind} {name!r} is registered already, as {self[name]!r}")
        self[name] = entry


distiller_dict = Registry("distiller")
cifar_model_dict = Registry("CIFAR model")
tiny_imagenet_model_dict = Registry("Tiny-ImageNet model")
imagenet_model_dict = Registry("ImageNet model")
dataset_dict = Registry("data set")
task_dict = Registry("task")

# By a data set's model_family.
MODEL_FAMILIES = {
    "cifar": cifar_model_dict,
    "tiny_imagenet": tiny_imagenet_model_dict,
    "imagenet": imagenet_model_dict,
}


_opened: list[Any] = [None] * 4  # cfg.DATASET, the class, what cfg.DATASET held then, the data set


def open_dataset(cfg: Any) -> Any:
    """The data set of a configuration: its facts, and ``load()``; see :class:`mdistiller.dataset.DataSet`.

    A configuration's data set is opened once, and again where a key below ``DATASET`` has changed.

    Raises:
        UnknownName: ``DATASET.TYPE`` names none.
    """
    keys, kind = cfg.DATASET, dataset_dict[cfg.DATASET.TYPE]
    if _opened[0] is not keys or _opened[1:3] != [kind, keys]:
        _opened[:] = keys, kind, copy.deepcopy(keys), kind.open(cfg)
    return _opened[3]


def image_side(cfg: Any) -> int:
    """Side in pixels of the images of a run: ``DATASET.IMAGE_SIZE``, or the data set's own where that is 0."""
    return open_dataset(cfg).image_size
