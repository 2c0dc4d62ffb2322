"""Common parts of the commands: a user's mistake ends with one message and exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdistiller.consent import FLAG
from mdistiller.messages import as_typed
from mdistiller.plugins import place_in_file
from mdistiller.registry import InputError, RunError

from .hooks import StopRequested
from .processes import distributed


def command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and end the process.

    Exit codes: 0; 2 for a user's mistake; 1 for a failed run; 143 or 130 for a run that a signal stopped. With several
    processes, only the process that raised the error prints the message.
    """
    ended_together = False
    try:
        code = main() or 0
        sys.stdout.flush()
        ended_together = True
    except BrokenPipeError:  # the reader of our output has ended: tools/list.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
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
    except (Exception, SystemExit) as error:
        place = place_in_file(error)
        if not place:
            raise
        if isinstance(error, SystemExit):
            _say(f"error: the method file {place}, ended the program by SystemExit: {error}", error)
        else:
            traceback.print_exception(error)
            _say(f"error: raised in the method file {place}: {type(error).__name__}: {error}", error)
        code = 1
    except KeyboardInterrupt:  # before or after the training; during it, hooks handle the signal
        code = 128 + signal.SIGINT
    if ended_together:
        distributed.stop()
    else:
        distributed.exit_now(code)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """Options of a command, with its docstring as the help; an option that is given twice is refused.

    Args:
        name: of the command: ``"train"``.
        about: its docstring.
    """

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(
            prog=as_typed(f"python tools/{name}.py"),
            description=as_typed(about or ""),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.register("action", None, _Once)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return as_typed(action.help or "")


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        if option_string is not None and before is not self.default:
            parser.error(f"{option_string} is given twice, {_shown(before)} and {_shown(values)}; give it once")
        setattr(namespace, self.dest, values)


def _shown(values: Any) -> str:
    return " ".join(map(str, values)) if isinstance(values, list) else str(values)


class PathError(InputError, argparse.ArgumentTypeError):
    """A text that cannot be a path. argparse shows the message of an ArgumentTypeError."""


def user_path(text: str) -> Path:
    """A path of a command line, with ``~`` as the user's folder.

    Raises:
        PathError: the text cannot be a path.
    """
    try:
        path = Path(text).expanduser()
        path.resolve()  # raises for a NUL in the path, and for links that lead to each other
        if not text:
            raise ValueError("it is empty")
    except (OSError, RuntimeError, ValueError) as error:
        raise PathError(f"{text!r} is no path: {error}") from None
    return path


def allow_plugins_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-plugins``, for every command that reads a configuration from a file."""
    parser.add_argument(
        FLAG, action="store_true", help="execute code that configurations name (DISTILLER.PLUGINS); read the code first"
    )


def check_output(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a file that cannot be written, before the work for its content.

    Args:
        path: the file; its folder must exist.
        option: the command line's option that names the file.

    Raises:
        InputError: the folder does not exist or is not writable, or ``path`` is no regular file.
    """
    path = user_path(os.fspath(path))
    if path.is_dir():
        problem = "it is a folder; name a file in it"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    elif path.exists() and not path.is_file():
        problem = "it is no regular file"
    else:
        try:
            with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
                return
        except OSError as error:  # cases that os.access does not find: /proc, a full table of files
            problem = error.strerror or str(error)
    raise InputError(f"{option}: cannot write {path}: {problem}")


def _say(message: str, error: Exception) -> None:
    if not getattr(error, "told_elsewhere", False):
        print(as_typed(message), file=sys.stderr)
