"""What the commands in ``tools/`` share: a mistake of the user ends with one message and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mdistiller.registry import InputError

from .hooks import NonFiniteLossError


def command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and leave the process: 0, 2 for bad input, 1 for a run that failed."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough: tools/list.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        code = 141  # as a shell reports SIGPIPE
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except NonFiniteLossError as error:
        print(f"stopped: {error}", file=sys.stderr)
        code = 1
    raise SystemExit(code)
