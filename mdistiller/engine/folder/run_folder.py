"""A run's folder: what may be started in it, who may write to it, what stands in it before the first step."""

from __future__ import annotations

import datetime
import errno
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import mdistiller
from mdistiller.files import lock
from mdistiller.messages import say
from mdistiller.registry import InputError

from ..cfg import experiment_name
from ..config.experiment import changed_keys
from ..config.node import read_yaml
from ..processes import distributed
from ..utils import processor_name
from .checkpoint import previous, write_atomically


def run_folder(cfg: Any) -> Path:
    """``LOG.PREFIX/PROJECT/(NAME or TAG)``."""
    return Path(cfg.LOG.PREFIX) / experiment_name(cfg)


def check_folder(folder: Path, cfg: Any, resume: bool, overwrite: bool, quiet: bool = False) -> bool:
    """Refuse to mix two runs; returns whether there is something to resume. Notices are printed unless ``quiet``.

    Raises:
        InputError: the folder holds another run, or something that is no run.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    try:
        filled = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    except OSError as error:
        raise _unusable(folder, error) from None
    if not filled:
        _check_place(folder)
        if resume and not quiet:
            say(f"nothing to resume in {folder}; starting from the beginning")
        return False
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} exists and is no run's folder (it holds no config.yaml); name another with EXPERIMENT.NAME"
        )
    if resume:
        changes = _check_same_experiment(folder, cfg)
        for change in [] if quiet else changes:
            say(f"resuming although {change}")
        latest = folder / "latest"
        if latest.is_file() or previous(latest).is_file():
            return True
        if _is_finished(folder):
            raise InputError(
                f"{folder} holds a finished run without its latest, from which it would go on; replace the run by "
                "--overwrite, or name another folder with EXPERIMENT.NAME"
            )
        if not quiet:
            say(f"{folder} holds no latest to resume from; starting from the beginning")
        return False
    if not overwrite:
        raise InputError(
            f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, or name "
            "another folder with EXPERIMENT.NAME"
        )
    return False


def _is_finished(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "results.json").read_text()).get("status") == "finished"
    return False


def _check_place(folder: Path) -> None:
    """Refuse a folder that could not be made, before the teacher is scored and the data are fetched."""
    above = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    if not above.is_dir():
        raise _unusable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(above, os.W_OK):
        raise _unusable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_same_experiment(folder: Path, cfg: Any) -> list[str]:
    """Refuse to resume another experiment; returns the changes that are allowed."""
    content = read_yaml(folder / "config.yaml")
    if not isinstance(content, dict):
        raise InputError(f"{folder / 'config.yaml'} holds no configuration; replace the run by --overwrite")
    fatal, harmless = changed_keys(content, cfg)
    if fatal:
        raise InputError(
            f"{folder} holds another experiment and cannot be resumed as this one: {', '.join(fatal)}; "
            "give the settings that it was begun with, or name another folder with EXPERIMENT.NAME"
        )
    return harmless


LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system gives the lock back when this one dies.

    Raises:
        InputError: another process trains there.
    """
    with (folder / LOCK).open("w") as file:
        if not lock(file):
            raise InputError(f"another process is training in {folder}; name another folder with EXPERIMENT.NAME")
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows removes no file that is open
                (folder / LOCK).unlink(missing_ok=True)


RUN_FILES = (
    "latest", "latest_previous", "best", "epoch_*", "student_*", "metrics.csv", "worklog.txt", "results.json",
    "config.yaml", "environment.json",
)  # fmt: skip


def clear_folder(folder: Path) -> None:
    """Delete what a run writes; notes of others and folders below it stay."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "train.events", ignore_errors=True)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {folder}: {error.strerror}; choose another place with LOG.PREFIX")


def write_environment(path: Path, environment: dict[str, Any], resumed: bool) -> None:
    """Where the run is going on; where it ran before a resume is kept under ``"earlier"``."""
    earlier: list[Any] = []
    if resumed:
        with suppress(OSError, ValueError):
            before = json.loads(path.read_text())
            earlier = [*before.pop("earlier", []), before]
    write_atomically(path, json.dumps({**environment, "earlier": earlier}, indent=1) + "\n")


def environment(cfg: Any, device: torch.device) -> dict[str, Any]:
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "mdistiller": mdistiller.__version__,
        "git": _git_hash(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor_name(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "machine": platform.platform(),
        "seed": cfg.EXPERIMENT.SEED,
    }


def _git_hash() -> str | None:
    """The commit of the code, with ``+`` where files were changed; ``None`` outside a checkout."""
    root = Path(mdistiller.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere below a checkout of something else
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
