"""Notices and warnings to the user: one form, one way, from the first process only."""

from __future__ import annotations

import sys

from mdistiller.functional.gather import this_process

COLORS = {"INFO": 36, "TRAIN": 32, "EVAL": 31}


def log_msg(msg: str, mode: str = "INFO") -> str:
    """``[MODE] msg``, on a terminal in the colour of the mode (``INFO``, ``TRAIN`` or ``EVAL``)."""
    if not sys.stdout.isatty():
        return f"[{mode}] {msg}"
    return f"\033[{COLORS[mode]}m[{mode}] {msg}\033[0m"


def say(message: str, mode: str = "INFO") -> None:
    """Print a notice on standard output, in the form of :func:`log_msg`; only the first process does."""
    if this_process()[0] == 0:
        print(log_msg(message, mode), flush=True)


def warn(message: str, mode: str = "INFO") -> None:
    """The same for what the user should look at."""
    say(f"WARNING: {message}", mode)
