"""What the commands in ``tools/`` share: a mistake of the user ends with one message and exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mdistiller.consent import FLAG
from mdistiller.registry import InputError, RunError

from .hooks import StopRequested
from .processes import distributed


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
    except RunError as error:
        _say(f"stopped: {error}", error)
        code = 1
    except StopRequested as error:
        if distributed.is_first_process():
            print(error, file=sys.stderr)
        code = 128 + error.number
        ended_together = True
    except KeyboardInterrupt:  # before or after the training, which handles it itself
        code = 128 + signal.SIGINT
    if ended_together:
        distributed.stop()
    else:
        distributed.exit_now(code)
    raise SystemExit(code)


def allow_plugins_option(parser: argparse.ArgumentParser) -> None:
    """The option of every command that reads a configuration from a file."""
    parser.add_argument(
        FLAG, action="store_true", help="execute code that configurations name (DISTILLER.PLUGINS); read it before"
    )


def check_output(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: the file; its folder must be there.
        option: what names it on the command line.

    Raises:
        InputError: no such folder, one that is not writable, or a folder in the file's place.
    """
    path = Path(path)
    if path.is_dir():
        problem = "it is a folder; name a file in it"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "no permission"
    else:
        return
    raise InputError(f"{option}: cannot write {path}: {problem}")


def _say(message: str, error: Exception) -> None:
    if not getattr(error, "told_elsewhere", False):
        print(message, file=sys.stderr)
