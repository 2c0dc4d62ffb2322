"""Runs the commands inside the test's process, since a new process needs seconds to import torch."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """Exit code, and the texts on standard output and standard error."""

    code: int
    out: str
    err: str


def run_tool(name: str, arguments: list[object]) -> Outcome:
    """Run ``tools/NAME.py ARGUMENTS`` as ``python`` would, in the current folder."""
    return run_script(ROOT / "tools" / f"{name}.py", arguments)


def run_module(name: str, arguments: list[object]) -> Outcome:
    """Run ``python -m mdistiller NAME ARGUMENTS`` likewise."""
    return run_script(ROOT / "mdistiller" / "__main__.py", [name, *arguments])


def run_script(path: Path, arguments: list[object]) -> Outcome:
    """Run ``PATH ARGUMENTS`` as ``python`` would, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())
