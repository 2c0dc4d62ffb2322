"""What the commands in ``tools/`` share: a mistake of the user ends with one message and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from mdistiller.registry import InputError

from .checkpoint import DiskFullError
from .hooks import NonFiniteLossError, StopRequested
from .prepare import PreparationError


def command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and leave the process: 0; 2 for bad input; 1 for a run that failed; 143 or 130 for one
    that a signal stopped."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough: tools/list.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        code = 141  # as a shell reports SIGPIPE
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (NonFiniteLossError, PreparationError, DiskFullError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        code = 1
    except StopRequested as error:
        print(error, file=sys.stderr)
        code = 128 + error.number
    except KeyboardInterrupt:  # before or after the training, which handles it itself
        code = 128 + signal.SIGINT
    raise SystemExit(code)
