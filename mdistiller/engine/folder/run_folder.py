"""A run's folder: checks before a start, the lock, and the files that are written before the first step."""

from __future__ import annotations

import csv
import datetime
import errno
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
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

LOCK, PROBE, EVENTS, CHANGES, CLASSES = ".lock", ".writable", "train.events", "changes.csv", "classes.json"
CHECKPOINTS = ("latest", "latest_previous", "best", "epoch_*", "student_*")
RUN_FILES = (  # config.yaml is deleted last, since a folder without it is not recognised as a run's
    *CHECKPOINTS, "metrics.csv", "worklog.txt", "results.json", "environment.json", "pictures.png", CHANGES, CLASSES,
    "config.yaml",
)  # fmt: skip


def run_folder(cfg: Any) -> Path:
    """``LOG.PREFIX/PROJECT/(NAME or TAG)``."""
    return Path(cfg.LOG.PREFIX) / experiment_name(cfg)


def check_folder(folder: Path, cfg: Any, resume: bool, overwrite: bool, quiet: bool = False) -> bool:
    """Refuse to mix two runs. Returns whether there is a run to resume. Prints notices unless ``quiet``.

    Raises:
        InputError: the folder holds another run or other files.
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
            f"{folder} exists and is no run's folder (it holds no config.yaml); name another folder with "
            "EXPERIMENT.NAME"
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
    """Whether a killed process may have left this file in a run's folder."""
    return path.name in (LOCK, PROBE) or fnmatch(path.name, ".*.tmp")


def _check_kinds(folder: Path) -> None:
    """Refuse a folder with the name of a run's file, and a file with the name of a run's folder."""
    for path in (path for pattern in RUN_FILES for path in folder.glob(pattern)):
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is in the way: a run writes a file of this name; move it elsewhere")
    for path in (folder / EVENTS, folder / EVENTS / "steps"):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is in the way: a run makes a folder of this name; move it elsewhere")


def holds_run(folder: Path) -> bool:
    """Whether the folder holds a checkpoint, an epoch's numbers or results, which a new start would delete."""
    metrics = folder / "metrics.csv"
    lines = metrics.is_file() and metrics.stat().st_size > 0
    return lines or _is_finished(folder) or any(path for name in CHECKPOINTS for path in folder.glob(name))


def _is_finished(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "results.json").read_text()).get("status") == "finished"
    return False


def _check_place(folder: Path) -> None:
    """Refuse a folder that cannot be made, before the data are downloaded and the teacher is scored."""
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir():
        raise _unusable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(above, os.W_OK):
        raise _unusable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_same_experiment(folder: Path, cfg: Any) -> None:
    """Refuse to resume another experiment. The reader of ``latest`` prints the allowed changes."""
    content = read_yaml(folder / "config.yaml")
    if not isinstance(content, dict):
        raise InputError(f"{folder / 'config.yaml'} holds no configuration; replace the run by --overwrite")
    fatal, _ = changed_keys(content, cfg)
    if fatal:
        raise InputError(
            f"{folder} holds another experiment and cannot be resumed as this one: {', '.join(map(str, fatal))}; "
            "use the settings of its first start, or name another folder with EXPERIMENT.NAME"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other processes; the system removes the lock if this process dies.

    Raises:
        InputError: another process trains in the folder.
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
            with suppress(OSError):  # Windows does not remove an open file; the folder may be deleted
                (folder / LOCK).unlink()


def clear_folder(folder: Path) -> None:
    """Delete the files of a run; other files and subfolders stay."""
    shutil.rmtree(folder / EVENTS, ignore_errors=True)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def keep_changes(folder: Path, cfg: Any, epoch: int) -> None:
    """Add the changed settings of a resumed run to ``changes.csv``, before ``config.yaml`` is written again.

    Args:
        folder: the run's.
        cfg: the new settings.
        epoch: the first epoch with the new settings.
    """
    _, changes = changed_keys(read_yaml(folder / "config.yaml"), cfg)
    rows = _changes(folder)
    latest = {row["key"]: row for row in rows}
    new = [{"epoch": str(epoch), **{name: str(value) for name, value in c._asdict().items()}} for c in changes]
    new = [row for row in new if latest.get(row["key"]) != row]  # a process killed before config.yaml left this row
    if new:
        write_atomically(folder / CHANGES, csv_text(("epoch", *Change._fields), [*rows, *new]))


def changed_settings(folder: Path, cfg: Any) -> list[str]:
    """The keys in ``changes.csv`` that decide a run's result."""
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


def write_classes(folder: Path, classes: Sequence[str], resumed: bool) -> None:
    """Keep the names of the classes, in the order of the student's outputs, as a JSON list.

    Raises:
        InputError: the run was started with other classes.
    """
    path, now = folder / CLASSES, [str(name) for name in classes]
    if resumed and path.is_file():
        before = json.loads(path.read_text())
        if before != now:
            gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
            raise InputError(
                f"{folder} was run with other classes: it has {', '.join(gone) or 'no other'}, and the data set now "
                f"has {', '.join(new) or 'no other'}; restore the images, or name another folder with EXPERIMENT.NAME"
            )
    write_atomically(path, json.dumps(now, indent=0) + "\n")


def write_environment(path: Path, environment: dict[str, Any], resumed: bool) -> None:
    """Write the run's environment. The environments before a resume are kept under ``"earlier"``."""
    earlier: list[Any] = []
    if resumed:
        try:
            before = json.loads(path.read_text())
            earlier = [*before.pop("earlier", []), before]
        except (OSError, ValueError, TypeError, AttributeError):
            warn(f"{path} cannot be read; the run's earlier environments are lost")
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
    """The commit of the code, with ``+`` if files have changed; ``None`` outside a checkout."""
    root = Path(mdistiller.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed below a checkout of another project
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
