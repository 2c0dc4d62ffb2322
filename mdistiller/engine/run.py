"""One run from a configuration to results in a folder: what ``tools/train.py`` calls, for use in Python."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import mdistiller
from mdistiller.dataset import Loaders, build_loaders
from mdistiller.plugins import load_methods
from mdistiller.registry import InputError, dataset_dict, distiller_dict

from . import distributed
from .build import build_distiller, build_student, build_teacher, needs_teacher, teacher_checkpoint
from .cfg import experiment_name, relevant_part
from .checkpoint import previous, remove_leftovers, write_atomically
from .config_node import read_yaml
from .evaluate import evaluate
from .experiment import changed_keys
from .precision import Precision, resolve_device
from .random_state import seed_everything, seed_process
from .trainer import BaseTrainer, trainer_dict
from .utils import log_msg, processor_name


def run(cfg: Any, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, evaluate and write the run's folder.

    Under torchrun, the processes train together; the first one writes.

    Args:
        cfg: a checked configuration, see :func:`mdistiller.engine.cfg.load_config`.
        resume: go on where the folder's ``latest`` stands; from the start where there is none.
        overwrite: delete what an earlier run left in the folder.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: anything about the configuration, the data or the files that keeps the run from starting.
    """
    distributed.start()
    folder = run_folder(cfg)
    distributed.first(lambda: check_folder(folder, cfg, resume, overwrite))
    trainer, facts = build_run(cfg)
    with ExitStack() as stack:

        def enter() -> bool:
            _make(folder)
            stack.enter_context(_alone_in(folder))
            return check_folder(folder, cfg, resume, overwrite, quiet=True)  # again: another run may have been faster

        resumed = distributed.first(enter)
        if resumed:
            trainer.resume()
            with distributed.together():
                _check_rest(trainer, facts, folder)
        distributed.first(lambda: _begin(folder, cfg, trainer, resumed, overwrite))
        trainer.results.update(facts)
        return trainer.train()


def _begin(folder: Path, cfg: Any, trainer: BaseTrainer, resumed: bool, overwrite: bool) -> None:
    """What stands in the folder before the first step."""
    if overwrite:
        _clear(folder)
    remove_leftovers(folder)
    write_atomically(folder / "config.yaml", cfg.dump())
    _write_environment(folder / "environment.json", _environment(cfg, trainer), resumed)


def build_run(cfg: Any) -> tuple[BaseTrainer, dict[str, Any]]:
    """Data, networks, method and trainer, and the facts about them for ``results.json``."""
    with distributed.together():
        file = load_methods(cfg.DISTILLER.PLUGINS, cfg.DISTILLER.TYPE)  # in this process, perhaps not the first
        seed_everything(cfg.EXPERIMENT.SEED)
        # Before the data, like the networks: nothing is downloaded for a run that cannot start.
        distributed.check_device(resolve_device(cfg.SOLVER.DEVICE))
        precision = Precision.from_cfg(cfg)
        num_classes = dataset_dict[cfg.DATASET.TYPE].num_classes
        student = build_student(cfg, num_classes)
    teacher = distributed.one_by_machine(lambda: build_teacher(cfg, num_classes) if needs_teacher(cfg) else None)
    loaders = distributed.one_by_machine(lambda: build_loaders(cfg, precision.device))
    facts: dict[str, Any] = {
        "experiment": experiment_name(cfg),
        "method": cfg.DISTILLER.TYPE,
        "student": cfg.DISTILLER.STUDENT,
        "dataset": cfg.DATASET.TYPE,
        "seed": cfg.EXPERIMENT.SEED,
        "training_images": loaders.num_data,
    }
    if file is not None:
        facts["method_file"] = {"path": str(file.path), "sha256": file_digest(file.path)}
    if teacher is not None:
        facts["teacher"] = score_teacher(cfg, teacher, loaders)
    with distributed.together():
        torch.manual_seed(cfg.EXPERIMENT.SEED)  # a method's own modules do not depend on the teacher's size
        distiller = build_distiller(cfg, student, teacher, loaders.num_data)
    facts["extra_parameters"] = distiller.get_extra_parameters() if teacher is not None else 0
    compared_on = loaders.test if loaders.val is None else loaders.val
    trainer = trainer_dict[cfg.SOLVER.TRAINER](
        experiment_name(cfg),
        distiller,
        loaders.train,
        compared_on,
        cfg,
        test_loader=None if loaders.val is None else loaders.test,
    )
    if distributed.rank() and not cfg.SOLVER.GATHER:  # dropout, say, differs between processes
        seed_process(cfg.EXPERIMENT.SEED, distributed.rank())
    return trainer, facts


def score_teacher(cfg: Any, teacher: torch.nn.Module, loaders: Loaders) -> dict[str, Any]:
    """The teacher's accuracy on the test split, printed: a wrong checkpoint shows before the first step."""
    precision = Precision.from_cfg(cfg)
    result = evaluate(precision.place(teacher), loaders.test, precision)
    name = cfg.DISTILLER.TEACHER
    checkpoint = cfg.DISTILLER.TEACHER_CKPT or "its public weights"
    print(
        log_msg(
            f"Teacher {name} ({checkpoint}): top-1 {result.top1:.2f}, top-5 {result.top5:.2f} "
            f"on {result.count} test images",
            "INFO",
        )
    )
    path = teacher_checkpoint(cfg)
    digest = file_digest(path) if path is not None else None
    return {"name": name, "checkpoint": checkpoint, "sha256": digest, "top1": result.top1, "top5": result.top5}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: tells whether a checkpoint is still the one that was used."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
            print(log_msg(f"nothing to resume in {folder}; starting from the beginning", "INFO"))
        return False
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} exists and is no run's folder (it holds no config.yaml); name another with EXPERIMENT.NAME"
        )
    if resume:
        changes = _check_same_experiment(folder, cfg)
        for change in [] if quiet else changes:
            print(log_msg(f"resuming although {change}", "INFO"))
        latest = folder / "latest"
        if latest.is_file() or previous(latest).is_file():
            return True
        if _is_finished(folder):
            raise InputError(
                f"{folder} holds a finished run without its latest, from which it would go on; replace the run by "
                "--overwrite, or name another folder with EXPERIMENT.NAME"
            )
        if not quiet:
            print(log_msg(f"{folder} holds no latest to resume from; starting from the beginning", "INFO"))
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
    fatal, harmless = changed_keys(content, relevant_part(cfg), distiller_dict[cfg.DISTILLER.TYPE].section)
    if fatal:
        raise InputError(
            f"{folder} holds another experiment and cannot be resumed as this one: {', '.join(fatal)}; "
            "give the settings that it was begun with, or name another folder with EXPERIMENT.NAME"
        )
    return harmless


def _check_rest(trainer: BaseTrainer, facts: dict[str, Any], folder: Path) -> None:
    """What only shows once the state is there: another teacher behind the same path, fewer epochs than are done."""
    before, now = (results.get("teacher", {}).get("sha256") for results in (trainer.results, facts))
    if before and now and before != now:
        raise InputError(
            f"{folder} was run with another teacher: its checkpoint's SHA-256 was {before[:12]}..., is {now[:12]}..."
        )
    begun, wanted = trainer.epoch - (trainer.step_in_epoch == 0), trainer.cfg.SOLVER.EPOCHS
    scored = trainer.results.get("last", {}).get("epoch", 0)
    if begun > wanted or (begun == wanted and trainer.step_in_epoch == 0 and scored < wanted):
        raise InputError(
            f"{folder} has {begun} epochs behind it{'' if begun > wanted else ', the last of them not evaluated'}, and "
            f"SOLVER.EPOCHS is {wanted}; give at least {begun + (begun == wanted)}"
        )


LOCK = ".lock"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system gives the lock back when this one dies.

    Raises:
        InputError: another process trains there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is training in {folder}; name another folder with EXPERIMENT.NAME"
            ) from None
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


RUN_FILES = (
    "latest", "latest_previous", "best", "epoch_*", "student_*", "metrics.csv", "worklog.txt", "results.json",
    "config.yaml", "environment.json",
)  # fmt: skip


def _clear(folder: Path) -> None:
    """Delete what a run writes; notes of others and folders below it stay."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "train.events", ignore_errors=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {folder}: {error.strerror}; choose another place with LOG.PREFIX")


def _write_environment(path: Path, environment: dict[str, Any], resumed: bool) -> None:
    """Where the run is going on; where it ran before a resume is kept under ``"earlier"``."""
    earlier: list[Any] = []
    if resumed:
        with suppress(OSError, ValueError):
            before = json.loads(path.read_text())
            earlier = [*before.pop("earlier", []), before]
    write_atomically(path, json.dumps({**environment, "earlier": earlier}, indent=1) + "\n")


def _environment(cfg: Any, trainer: BaseTrainer) -> dict[str, Any]:
    device = trainer.precision.device
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
