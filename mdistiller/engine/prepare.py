"""A method's stage before training, computed once and saved in a file.

A method with ``Distiller.prepare`` has such a stage. If it also defines ``Distiller.preparation``, the result is saved.
The file's name holds a hash of the method's settings, the options of the role ``data`` (also the seed), the teacher's
weights and the number format. So students of one teacher share the file.

With several processes, each process computes the stage on whole batches, as a single process would. Then all processes
take the result of the first process, computed or read.

A file is used only if it is undamaged and was made with the same settings. A run that is killed during the stage saves
nothing of it; the next start begins the stage again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import mdistiller
from mdistiller.contract import contract_of
from mdistiller.dataset import Loader
from mdistiller.messages import say, warn
from mdistiller.options import options_of
from mdistiller.registry import RunError

from .batch import to_batch
from .config.experiment import flatten
from .folder.checkpoint import CheckpointError, check_weights, fingerprint, load_checkpoint, not_finite, save_checkpoint
from .folder.state import NUMBER, check_kind
from .processes import distributed

if TYPE_CHECKING:
    from .trainer import BaseTrainer

CONTENT = {"settings": dict, "model": {str: Tensor}, "fingerprint": int, "seconds": NUMBER, "facts": {str: object}}
FOLDER = "prepared"  # below LOG.PREFIX
MESSAGE_EVERY = 30  # seconds


class PreparationError(RunError):
    """The result of the stage before training is not finite."""


def prepare(trainer: BaseTrainer) -> None:
    """Run the method's stage before training, if there is one, or read its result from the file.

    ``results["preparation"]`` then holds the seconds of the computation, whether the result comes from a file, and the
    facts that the method reports.

    Raises:
        PreparationError: the result is not finite; it is not saved.
    """
    distiller = trainer.distiller
    if not contract_of(type(distiller)).prepares:
        return
    name, kept = trainer.cfg.DISTILLER.TYPE, distiller.preparation()
    if kept is None:
        seconds, facts = _compute(trainer, name)
        distributed.broadcast_state(distiller)
        trainer.results["preparation"] = {"seconds": seconds, "from_file": False, **facts}
        return
    module, options = kept
    if not module.state_dict():  # with these settings there is nothing to prepare
        return
    settings = settings_of(trainer, options)
    path = file_of(trainer.cfg, settings)
    content = distributed.on_first_process(lambda: _usable(path, settings, module))
    from_file = content is not None
    if content is None:
        seconds, facts = _compute(trainer, name)
        distributed.broadcast_state(module)
        state = {key: value.cpu() for key, value in module.state_dict().items()}
        if bad := not_finite(state):
            raise PreparationError(f"{name}'s stage before training: {bad[0]} is not finite; lower its learning rate")
        content = {"settings": settings, "model": state, "fingerprint": fingerprint(state)}
        content |= distributed.broadcast_object({"seconds": seconds, "facts": facts})
        distributed.on_first_process(lambda: _save(content, path))
    else:
        module.load_state_dict(content["model"])
        say(f"{name}'s stage before training: read from {path}")
    trainer.results["preparation"] = {
        "seconds": content["seconds"],
        "from_file": from_file,
        "file": str(path),
        **content["facts"],
    }


def _save(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(content, path)


def settings_of(trainer: BaseTrainer, method_options: dict[str, Any]) -> dict[str, Any]:
    """All settings that decide the result, as plain values; ``method_options`` are those of the method's section."""
    teacher = trainer.distiller.teacher
    options = options_of(trainer.cfg)
    settings = {key: v for key, v in flatten(trainer.cfg).items() if key in options and options[key].role == "data"}
    settings |= {f"{trainer.distiller.section}.{key}": value for key, value in flatten(method_options).items()}
    if isinstance(trainer.train_loader, Loader):  # a script may use a loader of its own
        settings["training images"] = trainer.train_loader.dataset.split.images.fingerprint()
    settings["teacher's weights"] = None if teacher is None else fingerprint(teacher.state_dict())
    settings["autocast"] = str(trainer.precision.autocast_dtype)
    settings["device"] = trainer.precision.device.type  # devices round differently
    settings["mdistiller"] = mdistiller.__version__
    return settings


def file_of(cfg: Any, settings: dict[str, Any]) -> Path:
    """``LOG.PREFIX/prepared/METHOD_TEACHER_<hash of the settings>``."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cfg.LOG.PREFIX) / FOLDER / f"{cfg.DISTILLER.TYPE}_{cfg.DISTILLER.TEACHER.replace('/', '_')}_{digest}"


def _usable(path: Path, settings: dict[str, Any], module: nn.Module) -> dict[str, Any] | None:
    """The file's content; ``None`` if there is no file, or after a warning if the file must not be used."""
    if not path.exists():
        return None
    try:
        content = load_checkpoint(path)
        _check_content(content, path, settings, module)
    except CheckpointError as error:
        warn(f"{error}; computing it again")
        return None
    return content


def _check_content(content: Any, path: Path, settings: dict[str, Any], module: nn.Module) -> None:
    if not isinstance(content, dict) or not CONTENT.keys() <= content.keys():
        raise CheckpointError(f"{path} does not hold the result of a stage before training")
    check_kind(content, CONTENT, str(path))
    if content["settings"] != settings:
        raise CheckpointError(f"{path} was made with other settings")
    if fingerprint(content["model"]) != content["fingerprint"]:
        raise CheckpointError(f"{path} is damaged: its weights do not match its checksum")
    check_weights(module.state_dict(), content["model"], f"the result in {path}")


def _compute(trainer: BaseTrainer, name: str) -> tuple[float, dict[str, Any]]:
    """Run the stage. Returns its seconds and the method's facts."""
    say(f"{name}'s stage before training: started")
    trainer.distiller.train()
    start = time.perf_counter()
    said_at = start

    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        nonlocal said_at
        if time.perf_counter() - said_at > MESSAGE_EVERY:
            said_at = time.perf_counter()
            say(f"{name}'s stage before training: epoch {epoch}")
        if hasattr(trainer.train_loader, "set_epoch"):
            trainer.train_loader.set_epoch(epoch)
        for item in trainer.train_loader:
            yield to_batch(item, trainer.precision)

    with getattr(trainer.train_loader, "undivided", nullcontext)():
        facts = trainer.distiller.prepare(batches, trainer.precision.autocast) or {}
    trainer.precision.synchronize()
    seconds = round(time.perf_counter() - start, 3)
    say(f"{name}'s stage before training: done in {seconds:.1f} s")
    return seconds, facts
