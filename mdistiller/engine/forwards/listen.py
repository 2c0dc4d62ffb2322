"""The link that reports a network's inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .chain import Link

Heard = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


def listen(heard: Heard) -> Link:
    """A link for the place ``listen`` of a chain.

    Args:
        heard: called after each call with its arguments, keyword arguments and output.
    """
    return functools.partial(_listen, heard)


def _listen(heard: Heard, following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = following(*args, **kwargs)
    heard(args, kwargs, output)
    return output
