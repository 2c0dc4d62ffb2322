"""Notices and warnings to the user, printed by the first process only; and commands as the user types them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from mdistiller.functional.gather import this_process

TOOLS = Path(__file__).resolve().parents[1] / "tools"  # of the checkout; an installed package has none
COLORS = {"INFO": 36, "TRAIN": 32, "EVAL": 31}


def log_msg(msg: str, mode: str = "INFO") -> str:
    """``[MODE] msg``; on a terminal in the colour of the mode (``INFO``, ``TRAIN`` or ``EVAL``)."""
    if not sys.stdout.isatty():
        return f"[{mode}] {msg}"
    return f"\033[{COLORS[mode]}m[{mode}] {msg}\033[0m"


def say(message: str, mode: str = "INFO") -> None:
    """Print a notice on standard output, in the form of :func:`log_msg`."""
    if this_process()[0] == 0:
        print(log_msg(as_typed(message), mode), flush=True)


def warn(message: str, mode: str = "INFO") -> None:
    """Print a warning on standard output, in the same form."""
    say(f"WARNING: {message}", mode)


def _by_module() -> bool:
    """Whether this process is ``python -m mdistiller``."""
    script = Path(sys.argv[0])
    return (script.name, script.parent.name) == ("__main__.py", "mdistiller")


def as_typed(text: str) -> str:
    """``text`` with the commands as the user types them.

    Texts of the library name commands as they are in a checkout, ``python tools/train.py``. A user of
    ``python -m mdistiller``, and of an installed package, reads ``python -m mdistiller train``.
    """
    if TOOLS.is_dir() and not _by_module():
        return text
    text = text.replace("sh download_ckpts.sh", "python -m mdistiller.hub")
    text = re.sub(r"(torchrun [^\n]*?)tools/(\w+)\.py", r"\1-m mdistiller \2", text)
    return re.sub(r"(?:python )?\btools/(\w+)\.py", r"python -m mdistiller \1", text)


def command_line() -> str:
    """The command of this process, as its user typed it."""
    return shlex.join(["python", *(["-m", "mdistiller", *sys.argv[1:]] if _by_module() else sys.argv)])
