"""Code that settings name, a method file for example: may it run?

Such code runs with all rights of the user. Who types a command or writes a Python program has chosen the code. A
configuration, its bases and a plan may come from somebody else, so code that they name runs with
``--allow-plugins`` only (``allow_plugins=True`` in Python). Options that name code declare it
(:attr:`mdistiller.options.Option.code`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from .files import file_sha256
from .registry import InputError

COMMAND_LINE = "command line"
FLAG = "--allow-plugins"


def check_code(key: str, code: Sequence[str], named_by: str, allowed: bool) -> None:
    """Refuse code that a file names, unless the user allows it.

    Args:
        key: the setting.
        code: the setting's Python files or other code.
        named_by: :data:`COMMAND_LINE`, or the file with the setting.
        allowed: the user gave :data:`FLAG`.

    Raises:
        InputError: names the code, with the SHA-256 of each file, and what to type.
    """
    if allowed or named_by == COMMAND_LINE or not code:
        return
    typed = shlex.quote(code[0] if len(code) == 1 else f"[{', '.join(code)}]")
    files = ", ".join(map(_described, code))
    raise InputError(
        f"{named_by}: {key} names code, which runs with all your rights: {files}; nothing was executed. Read the code, "
        f"then add {FLAG} (in Python allow_plugins=True). A command that takes KEY VALUE, such as tools/train.py, also "
        f"accepts the code there: {key} {typed}"
    )


def _described(code: str) -> str:
    path = Path(code).expanduser()
    try:
        return f"{code} (SHA-256 {file_sha256(path)})" if path.is_file() else code
    except (OSError, ValueError):  # an unreadable file, or a text that cannot be a file's name
        return code
