"""The tables of methods, networks, data sets and tasks by name, and the errors that end a command with a message.

This module imports nothing of the package, so that every other module may import it. The tables are dictionaries:
``distiller_dict["KD"]`` is the class. An entry is added by a decorator of the packages or by plain assignment
(``distiller_dict["MINE"] = Mine``).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import Any


class InputError(ValueError):
    """A user's mistake in configuration, command line, data or files.

    The commands print its message and exit with code 2, without a traceback. Any other exception is a fault of the
    library and keeps its traceback. The message names the value and the allowed values, and says what to do.
    """


class RunError(RuntimeError):
    """A run that has started and cannot continue, because of its numbers or its disk.

    The commands print its message and exit with code 1, without a traceback.
    """


class UnknownName(InputError, KeyError):
    """A name that is not in a table. Also a ``KeyError``, because tables are dictionaries."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


SHORT_LIST = 8  # lists of up to this many names are shown whole


def closest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The allowed names most like ``name``, best first; letter case is ignored."""
    by_lower: dict[str, str] = {}
    for candidate in allowed:
        by_lower.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[match] for match in matches]


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """``"closest: A, B"``; with all allowed names if they are few or none of them is close."""
    allowed = sorted(allowed)
    near = closest(name, allowed)
    between = "; " if any("," in known for known in allowed) else ", "
    parts = ["closest: " + between.join(near)] if near else []
    if not near or len(near) < len(allowed) <= SHORT_LIST:
        parts.append("known: " + (between.join(allowed) or "none"))
    return "; ".join(parts)


def check_choice(key: str, value: Any, allowed: Iterable[str]) -> Any:
    """``value``, if the value is allowed for an option.

    Raises:
        InputError: the value is not allowed.
    """
    if value not in allowed:
        raise InputError(f"{key}: no {value!r}; {suggestion(str(value), allowed)}")
    return value


def _origin(entry: Any) -> Any:
    """Module and name of a class or function. They are equal if a notebook's cell is run twice."""
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", entry)


class Registry(dict):
    """A dictionary from names to entries of one kind. The error for a missing name has the closest names.

    Args:
        kind: the kind of the entries, for messages: ``"distiller"``.

    Attributes:
        finder: called with a missing name; returns the entry or ``None``, and may add the entry.
        advice: the end of the message for a missing name.
    """

    finder: Callable[[str], Any] | None = None
    advice = ""

    def __init__(self, kind: str, entries: dict[str, Any] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def __missing__(self, name: str) -> Any:
        entry = self.finder(name) if self.finder is not None else None
        if entry is not None:
            return entry
        raise UnknownName(self.refusal(name))

    def refusal(self, name: Any) -> str:
        """The message for a missing name."""
        return "; ".join(filter(None, [f"no {self.kind} named {name!r}", suggestion(str(name), self), self.advice]))

    def add(self, name: str, entry: Any) -> None:
        """Add ``entry``. A second entry of the same name is refused, unless the same definition was run again."""
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


_opened: list[Any] = [None] * 4  # cfg.DATASET, the class, a copy of cfg.DATASET, the data set


def open_dataset(cfg: Any) -> Any:
    """The data set of a configuration: its facts, and ``load()``; see :class:`mdistiller.dataset.DataSet`.

    A configuration's data set is opened once, and again after a change of a key below ``DATASET``.

    Raises:
        UnknownName: there is no data set ``DATASET.TYPE``.
    """
    keys, kind = cfg.DATASET, dataset_dict[cfg.DATASET.TYPE]
    if _opened[0] is not keys or _opened[1:3] != [kind, keys]:
        _opened[:] = keys, kind, copy.deepcopy(keys), kind.open(cfg)
    return _opened[3]


def image_side(cfg: Any) -> int:
    """Side of a run's images in pixels: ``DATASET.IMAGE_SIZE``, or the data set's own size if the key is 0."""
    return open_dataset(cfg).image_size
