"""The link that hears what a network is shown and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .chain import Link

Heard = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


def listen(heard: Heard) -> Link:
    """A link for the place ``listen`` of a chain.

    Args:
        heard: is told of each call: arguments, keyword arguments, output.
    """
    return functools.partial(_listen, heard)


def _listen(heard: Heard, following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = following(*args, **kwargs)
    heard(args, kwargs, output)
    return output
