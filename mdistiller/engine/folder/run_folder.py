"""A run's folder: what may be started in it, who may write to it, what stands in it before the first step."""

from __future__ import annotations

import csv
import datetime
import errno
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import mdistiller
from mdistiller.files import lock
from mdistiller.messages import command_line, say, warn
from mdistiller.options import options_of
from mdistiller.registry import InputError

from ..cfg import experiment_name
from ..config.experiment import UNDECLARED, Change, changed_keys
from ..config.node import read_yaml
from ..processes import distributed
from ..utils import processor_name
from .checkpoint import previous, write_atomically
from .writers import csv_text

LOCK, PROBE, EVENTS, CHANGES = ".lock", ".writable", "train.events", "changes.csv"
CHECKPOINTS = ("latest", "latest_previous", "best", "epoch_*", "student_*")
RUN_FILES = (  # config.yaml last: as long as anything is left of a run, the folder is a run's
    *CHECKPOINTS, "metrics.csv", "worklog.txt", "results.json", "environment.json", CHANGES, "config.yaml",
)  # fmt: skip


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
        filled = folder.is_dir() and not all(_is_trace(path) for path in folder.iterdir())
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
    _check_kinds(folder)
    if not holds_run(folder):
        if not quiet:
            say(f"{folder} holds a run that ended before it saved anything; starting from the beginning")
        return False
    if resume:
        _check_same_experiment(folder, cfg)
        latest = folder / "latest"
        if latest.is_file() or previous(latest).is_file():
            return True
        if _is_finished(folder):
            raise InputError(
                f"{folder} holds a finished run without its file latest, so it cannot continue; replace the run by "
                "--overwrite, or name another folder with EXPERIMENT.NAME"
            )
        if not quiet:
            say(f"{folder} holds no latest to resume from; starting from the beginning")
        return False
    if not overwrite:
        raise InputError(
            f"{folder} holds a run already; continue the run by --resume, replace it by --overwrite, or name "
            "another folder with EXPERIMENT.NAME"
        )
    return False


def _is_trace(path: Path) -> bool:
    """Whether a process that was killed may have left this file beside those of a run."""
    return path.name in (LOCK, PROBE) or fnmatch(path.name, ".*.tmp")


def _check_kinds(folder: Path) -> None:
    """Refuse a folder where a run writes a file, and a file where it makes a folder."""
    for path in (path for pattern in RUN_FILES for path in folder.glob(pattern)):
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is in the way: a run writes a file of that name; move it elsewhere")
    for path in (folder / EVENTS, folder / EVENTS / "steps"):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is in the way: a run makes a folder of that name; move it elsewhere")


def holds_run(folder: Path) -> bool:
    """Whether a new start in the folder would lose anything: a checkpoint, an epoch's numbers, results."""
    metrics = folder / "metrics.csv"
    lines = metrics.is_file() and metrics.stat().st_size > 0
    return lines or _is_finished(folder) or any(path for name in CHECKPOINTS for path in folder.glob(name))


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


def _check_same_experiment(folder: Path, cfg: Any) -> None:
    """Refuse to resume another experiment. The changes that are allowed are said by ``latest``'s reader."""
    content = read_yaml(folder / "config.yaml")
    if not isinstance(content, dict):
        raise InputError(f"{folder / 'config.yaml'} holds no configuration; replace the run by --overwrite")
    fatal, _ = changed_keys(content, cfg)
    if fatal:
        raise InputError(
            f"{folder} holds another experiment and cannot be resumed as this one: {', '.join(map(str, fatal))}; "
            "give the settings of its first start, or name another folder with EXPERIMENT.NAME"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system gives the lock back when this one dies.

    Raises:
        InputError: another process trains there.
    """
    try:
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise _unusable(folder, error) from None
    with file:
        if not lock(file):
            raise InputError(f"another process is training in {folder}; name another folder with EXPERIMENT.NAME")
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open; the folder may be gone
                (folder / LOCK).unlink()


def clear_folder(folder: Path) -> None:
    """Delete what a run writes; notes of others and folders below it stay."""
    shutil.rmtree(folder / EVENTS, ignore_errors=True)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def keep_changes(folder: Path, cfg: Any, epoch: int) -> None:
    """Before ``config.yaml`` is written anew for a run that goes on: what changes goes to ``changes.csv``.

    Args:
        folder: the run's.
        cfg: the settings from now on.
        epoch: the one from which on they count.
    """
    _, changes = changed_keys(read_yaml(folder / "config.yaml"), cfg)
    rows = _changes(folder)
    latest = {row["key"]: row for row in rows}
    new = [{"epoch": str(epoch), **{name: str(value) for name, value in c._asdict().items()}} for c in changes]
    new = [row for row in new if latest.get(row["key"]) != row]  # a kill may have come before config.yaml was written
    if new:
        write_atomically(folder / CHANGES, csv_text(("epoch", *Change._fields), [*rows, *new]))


def changed_settings(folder: Path, cfg: Any) -> list[str]:
    """The keys that changed on a resume and decide a run's result, as ``changes.csv`` has them."""
    options = options_of(cfg)
    keys = dict.fromkeys(row["key"] for row in _changes(folder))
    return [key for key in keys if options.get(key, UNDECLARED).decides_result]


def _changes(folder: Path) -> list[dict[str, str]]:
    path = folder / CHANGES
    if not path.is_file():
        return []
    with suppress(OSError, ValueError, csv.Error), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        if all(set(row) == {"epoch", *Change._fields} for row in rows):
            return rows
    raise InputError(f"{path} does not hold the changes of a run's settings; move it elsewhere")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / PROBE
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
        try:
            before = json.loads(path.read_text())
            earlier = [*before.pop("earlier", []), before]
        except (OSError, ValueError, TypeError, AttributeError):
            warn(f"{path} no longer says where the run was before")
    write_atomically(path, json.dumps({**environment, "earlier": earlier}, indent=1) + "\n")


def environment(cfg: Any, device: torch.device) -> dict[str, Any]:
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(),
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
