"""What the commands in ``tools/`` share: a mistake of the user ends with one message and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from mdistiller.registry import InputError

from . import distributed
from .checkpoint import DiskFullError
from .hooks import NonFiniteLossError, StopRequested
from .prepare import PreparationError


def command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and leave the process: 0; 2 for bad input; 1 for a run that failed; 143 or 130 for one
    that a signal stopped. Of several processes, the one that the error comes from says so."""
    ended_together = False
    try:
        code = main() or 0
        sys.stdout.flush()
        ended_together = True
    except BrokenPipeError:  # whoever read our output has seen enough: tools/list.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        code = 141  # as a shell reports SIGPIPE
    except InputError as error:
        _say(f"error: {error}", error)
        code = 2
    except (NonFiniteLossError, PreparationError, DiskFullError) as error:
        _say(f"stopped: {error}", error)
        code = 1
    except StopRequested as error:
        if distributed.is_first():
            print(error, file=sys.stderr)
        code = 128 + error.number
        ended_together = True
    except KeyboardInterrupt:  # before or after the training, which handles it itself
        code = 128 + signal.SIGINT
    if ended_together:
        distributed.stop()
    raise SystemExit(code)


def _say(message: str, error: Exception) -> None:
    if not getattr(error, "told_elsewhere", False):
        print(message, file=sys.stderr)
