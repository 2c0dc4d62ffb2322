"""One run, from a configuration to results in a folder. ``tools/train.py`` calls this; so can Python programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mdistiller.contract import check_step, contract_of
from mdistiller.dataset import Loaders, build_loaders
from mdistiller.files import file_sha256
from mdistiller.messages import say
from mdistiller.models.facts import facts_of
from mdistiller.options import OPTIONS
from mdistiller.plugins import hooks_of, load_methods, source_of
from mdistiller.registry import InputError, distiller_dict, image_side, open_dataset

from .build import (
    build_distiller,
    build_networks,
    build_student,
    build_teacher,
    reads_teacher_logits,
    teacher_checkpoint,
)
from .cfg import experiment_name, show_cfg
from .config.experiment import flatten, without_keys_of_fork
from .config.node import convert, read_yaml, value_at
from .folder.checkpoint import remove_leftovers, write_atomically
from .folder.run_folder import (
    CHANGES,
    alone_in,
    changed_settings,
    check_folder,
    clear_folder,
    environment,
    holds_run,
    keep_changes,
    make_folder,
    run_folder,
    write_classes,
    write_environment,
)
from .forwards.precision import Precision, resolve_device
from .hooks import Hook, add_hooks
from .processes import distributed
from .random_state import seed_everything, seed_process
from .task import task_of
from .trainer import BaseTrainer, trainer_dict


def run(
    cfg: Any,
    *,
    resume: bool = False,
    overwrite: bool = False,
    hooks: Iterable[Hook | type[Hook]] = (),
    show: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and write the run's folder.

    Under torchrun the processes train together, and the first process writes.

    Args:
        cfg: a checked configuration, see :func:`mdistiller.engine.cfg.load_config`.
        resume: continue from the folder's ``latest``, or start if there is none.
        overwrite: delete an earlier run's files in the folder.
        hooks: further hooks, see :func:`~mdistiller.engine.hooks.add_hooks`.
        show: print the configuration, after the check of the folder.

    Returns:
        The content of ``results.json``.

    Raises:
        InputError: a configuration, data or files with which the run cannot start.
    """
    distributed.start()
    folder = run_folder(cfg)
    if resume:
        cfg = _settled(cfg, _found_before(folder))
    distributed.on_first_process(lambda: check_folder(folder, cfg, resume, overwrite))
    with distributed.same_error():
        cfg = _settled(cfg, _found_now(cfg))
    if show:
        show_cfg(cfg)
    trainer, facts = build_run(cfg)
    add_hooks(trainer, hooks)
    return train_in_folder(trainer, facts, cfg, resume, overwrite)


def train_in_folder(
    trainer: BaseTrainer, facts: dict[str, Any], cfg: Any, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Lock the trainer's folder, resume or begin the run there, train; returns the content of ``results.json``.

    Args:
        trainer: as it was built.
        facts: for ``results.json``.
        cfg: the user's configuration.
        resume: see :func:`run`.
        overwrite: see :func:`run`.
    """
    folder = trainer.folder
    with ExitStack() as stack:

        def enter() -> bool:
            make_folder(folder)
            stack.enter_context(alone_in(folder))
            remove_leftovers(folder)
            return check_folder(folder, cfg, resume, overwrite, quiet=True)  # again, since another run may have begun

        resumed = distributed.on_first_process(enter)
        if resumed:
            trainer.resume()
            with distributed.same_error():
                _check_teacher(trainer, facts, folder)
                trainer.check_resumed()
        if not trainer.finished:  # else the files of the finished run do not change
            facts |= distributed.on_first_process(lambda: _begin(folder, cfg, trainer, resumed, overwrite))
        trainer.results.update(facts)
        return trainer.train()


def _settled(cfg: Any, found: Mapping[str, Any]) -> Any:
    """``cfg`` with what the run found in place of ``auto``.

    Args:
        cfg: the configuration.
        found: by dotted key.
    """
    keys = [key for key, value in flatten(cfg).items() if key in found and value in ("auto", ["auto"])]
    if not keys:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    for key in keys:
        section, _, name = key.rpartition(".")
        value_at(cfg, section)[name] = convert(found[key], OPTIONS[key].default, key, "config.yaml")
    cfg.freeze()
    return cfg


def _found_before(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` found in place of ``auto``."""
    path = folder / "config.yaml"
    content = read_yaml(path) if path.is_file() else None
    found = {key: value_at(content, key) for key, option in OPTIONS.items() if option.settled}
    return {key: value for key, value in found.items() if value is not None}


def _found_now(cfg: Any) -> dict[str, Any]:
    """What a run of ``cfg`` finds in place of ``auto``."""
    found: dict[str, Any] = {"SOLVER.CHANNELS_LAST": "on" if Precision.from_cfg(cfg).channels_last else "off"}
    if ["auto"] in (cfg.DATASET.MEAN, cfg.DATASET.STD):
        mean, std = open_dataset(cfg).normalisation
        say(f"images are normalised by mean {mean} and standard deviation {std}")
        found |= {"DATASET.MEAN": list(mean), "DATASET.STD": list(std)}
    return found


def _begin(folder: Path, cfg: Any, trainer: BaseTrainer, resumed: bool, overwrite: bool) -> dict[str, Any]:
    """Write the folder's files before the first step; return the facts for ``results.json``."""
    if overwrite or not holds_run(folder):
        clear_folder(folder)
    if resumed:
        keep_changes(folder, cfg, trainer.epoch)
    else:
        (folder / CHANGES).unlink(missing_ok=True)
    if trainer.classes:
        write_classes(folder, trainer.classes, resumed)
    write_atomically(folder / "config.yaml", cfg.dump())
    write_environment(folder / "environment.json", environment(trainer.cfg, trainer.precision.device), resumed)
    changed = changed_settings(folder, cfg)
    return {"changed_settings": changed} if changed else {}


def build_run(cfg: Any) -> tuple[BaseTrainer, dict[str, Any]]:
    """Data, networks, method and trainer, and the facts about them for ``results.json``."""
    with distributed.same_error():
        load_methods(cfg.DISTILLER.PLUGINS, cfg.DISTILLER.TYPE)  # a new process has not loaded the plugins yet
        check_step(distiller_dict[cfg.DISTILLER.TYPE])
        method_cfg, cfg = cfg, without_keys_of_fork(cfg)
        seed_everything(cfg.EXPERIMENT.SEED)
        # Device and networks are checked before the data, since nothing is downloaded for a run that cannot start.
        distributed.check_device(resolve_device(cfg.SOLVER.DEVICE))
        precision = Precision.from_cfg(cfg)
        num_classes = open_dataset(cfg).num_classes
        student = build_student(cfg, num_classes)
        networks = build_networks(cfg, num_classes)
    needs_teacher = contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher
    teacher = distributed.one_process_per_machine(lambda: build_teacher(cfg, num_classes) if needs_teacher else None)
    loaders = distributed.one_process_per_machine(lambda: build_loaders(cfg, precision.device))
    facts: dict[str, Any] = {
        "experiment": experiment_name(cfg),
        "method": cfg.DISTILLER.TYPE,
        "student": cfg.DISTILLER.STUDENT,
        "dataset": cfg.DATASET.TYPE,
        "seed": cfg.EXPERIMENT.SEED,
        "training_images": loaders.num_data,
    }
    source = source_of(distiller_dict[cfg.DISTILLER.TYPE])
    if source is not None:
        facts["method_file"] = source
    if loaders.num_data < cfg.SOLVER.BATCH_SIZE:
        say(f"SOLVER.BATCH_SIZE is {cfg.SOLVER.BATCH_SIZE}: all {loaders.num_data} training images are one batch")
    if teacher is not None:
        facts["teacher"] = score_teacher(cfg, teacher, loaders, num_classes)
    with distributed.same_error():
        torch.manual_seed(cfg.EXPERIMENT.SEED)  # a method's own modules do not depend on the teacher's size
        distiller = build_distiller(method_cfg, student, teacher, loaders.num_data, networks)
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
    trainer.outputs, trainer.classes = num_classes, open_dataset(cfg).classes
    add_hooks(trainer, hooks_of(cfg.DISTILLER.PLUGINS, cfg.DISTILLER.TYPE))
    if distributed.rank() and not cfg.SOLVER.GATHER:  # so that dropout, for example, differs between processes
        seed_process(cfg.EXPERIMENT.SEED, distributed.rank())
    return trainer, facts


def score_teacher(cfg: Any, teacher: torch.nn.Module, loaders: Loaders, num_classes: int) -> dict[str, Any]:
    """Score the teacher on the test split and print the score. A wrong checkpoint shows before the first step.

    A teacher of other classes has no score. Its method reads no logits.
    """
    precision, task = Precision.from_cfg(cfg), task_of(cfg)
    name, path, classes = cfg.DISTILLER.TEACHER, teacher_checkpoint(cfg), cfg.DISTILLER.TEACHER_CLASSES
    checkpoint = cfg.DISTILLER.TEACHER_CKPT or "its public weights"
    facts = {"name": name, "checkpoint": checkpoint, "sha256": file_sha256(path) if path is not None else None}
    if classes:
        facts["classes_sha256"] = file_sha256(Path(classes).expanduser())
    if not reads_teacher_logits(cfg):
        outputs = facts_of(teacher, [image_side(cfg)] * 2, "teacher").classes
        if outputs != num_classes:
            say(f"Teacher {name} ({checkpoint}): not scored, since it has {outputs} classes, not {num_classes}")
            return facts
    score = task.evaluate(precision.place(teacher), loaders.test, precision)
    say(f"Teacher {name} ({checkpoint}): {task.line(score.without_loss)} on {score.count} test images")
    return {**facts, **score.without_loss}


def _check_teacher(trainer: BaseTrainer, facts: dict[str, Any], folder: Path) -> None:
    """Checks that need the state: another teacher or method file at the same path."""
    for key, file in (("sha256", "checkpoint"), ("classes_sha256", "file of classes")):
        before, now = (results.get("teacher", {}).get(key) for results in (trainer.results, facts))
        if before and now and before != now:
            raise InputError(
                f"{folder} was run with another teacher: its {file}'s SHA-256 was {before[:12]}..., is {now[:12]}..."
            )
    before, now = (results.get("method_file", {}) for results in (trainer.results, facts))
    if before and now and before["sha256"] != now["sha256"]:
        say(f"resuming although {now['path']} has changed since: its SHA-256 was {before['sha256'][:12]}...")
