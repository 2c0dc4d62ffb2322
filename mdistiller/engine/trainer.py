"""The training loop. Everything beside forward, backward and step is a hook."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import mdistiller
from mdistiller.contract import contract_of
from mdistiller.messages import say, warn
from mdistiller.registry import InputError, Registry

from .batch import to_batch
from .config.experiment import changed_keys
from .folder.checkpoint import CheckpointError, check_fit, load_checkpoint, previous
from .forwards.cache import cache_teacher
from .forwards.compile import accelerate, begin_step
from .forwards.precision import Precision, hard_coded_cuda_explained
from .hooks import Hook, default_hooks
from .prepare import prepare
from .processes import distributed
from .processes.parallel import Parallel
from .random_state import random_state, restore_random_state, seed_process
from .solver import build_optimizer

trainer_dict = Registry("trainer")


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves for the hooks; tensors are detached and stay on the device.

    Args:
        batch: the named tensors that went in.
        logits: the student's, ``(B, K)``.
        losses: the method's weighted terms by name.
        total: their sum, ``()``.
        monitors: what the method wants watched beside its losses, ``()`` each.
    """

    batch: dict[str, Tensor]
    logits: Tensor
    losses: dict[str, Tensor]
    total: Tensor
    monitors: dict[str, Tensor] = field(default_factory=dict)


class BaseTrainer:
    """Trains a distiller and keeps its run's folder ``LOG.PREFIX/experiment_name``.

    Args:
        experiment_name: the folder below ``LOG.PREFIX``.
        distiller: the method with its networks; a DataParallel wrapper is taken off.
        train_loader: yields dictionaries or mdistiller's tuples.
        val_loader: what the epochs are compared on.
        cfg: the configuration.
        test_loader: where ``val_loader`` is a validation split: the test split, which last and best are scored
            on once, at the end.
    """

    backward_passes = 1  # of a step, see update

    def __init__(
        self,
        experiment_name: str,
        distiller: nn.Module,
        train_loader: Any,
        val_loader: Any,
        cfg: Any,
        test_loader: Any = None,
    ) -> None:
        self.cfg = cfg
        self.precision = Precision.from_cfg(cfg)
        self.distiller = self.precision.place(getattr(distiller, "module", distiller))
        accelerate(self.distiller, cfg)
        self.train_loader, self.val_loader, self.test_loader = train_loader, val_loader, test_loader
        self.teacher_cache = (
            cache_teacher(self.distiller, train_loader, cfg, self.precision) if cfg.SOLVER.CACHE_TEACHER else None
        )
        self.parallel = Parallel(
            self.distiller, cfg.SOLVER.GATHER, cfg.SOLVER.BATCH_NORM, overlap=self.backward_passes == 1
        )
        self.optimizer = self.init_optimizer(cfg)
        self.scaler = self.precision.scaler()
        self.folder = Path(cfg.LOG.PREFIX) / experiment_name
        self.epoch = 1  # the one in progress
        self.step_in_epoch = 0  # steps of it that are done
        self.step = 0  # steps done since the start
        self.row: dict[str, float] = {}  # the epoch's line in the logs, filled by the hooks
        self.results: dict[str, Any] = {}  # results.json, filled by the hooks
        self.contract = contract_of(type(self.distiller))
        self.hooks: list[Hook] = default_hooks(self)
        check_batches(self.distiller, train_loader, cfg.SOLVER.BATCH_NORM)
        self.averaged_at = 0  # the step after which processes last agreed on their statistics

    def init_optimizer(self, cfg: Any) -> torch.optim.Optimizer:
        return build_optimizer(cfg, self.distiller)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    def train(self, resume: bool = False) -> dict[str, Any]:
        """Run all epochs and return the results.

        Args:
            resume: go on from ``latest`` in the run's folder.
        """
        distributed.on_first_process(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        if resume:
            self.resume()
        if self.step == 0 and distributed.on_first_process((self.folder / "latest").exists):
            raise InputError(
                f"{self.folder} holds a run already; go on with it by resume=True, or give another name or LOG.PREFIX"
            )
        if self.step == 0:  # else the result came with the state
            prepare(self)
        try:
            self._call("before_train")
            while self.epoch <= self.cfg.SOLVER.EPOCHS:
                self.run_epoch()
            self._call("after_train")
        except BaseException as error:
            self.results["stopped_by"] = f"{type(error).__name__}: {error}"[:500]
            raise
        finally:
            for hook in self.hooks:
                hook.close()
        return self.results

    def run_epoch(self) -> None:
        self.distiller.train()
        if self.step_in_epoch == 0:  # else the epoch goes on after a resume
            self.row = {"epoch": self.epoch}
        self.distiller.on_epoch_start(self.epoch)
        self._call("before_epoch")
        self.parallel.begin_epoch()
        for item in self._items():
            self._call("before_step")
            output = self.run_step(to_batch(item, self.precision))
            self.parallel.end_step()
            self.step += 1
            self.step_in_epoch += 1
            self._call("after_step", output)
        self.precision.synchronize()
        self.agree()
        self._call("after_epoch")
        self.epoch += 1
        self.step_in_epoch = 0
        self._call("epoch_done")

    def run_step(self, batch: dict[str, Tensor]) -> StepOutput:
        given = {**batch, "epoch": self.epoch}
        if self.contract.fields is not None:
            given = {name: value for name, value in given.items() if name in self.contract.fields}
        begin_step(self.cfg)
        known = nullcontext() if self.teacher_cache is None else self.teacher_cache.of(batch)
        with known, self.precision.autocast(), hard_coded_cuda_explained(self.precision.device):
            if distributed.world_size() == 1:
                with contract_explained(self.distiller, given):
                    logits, losses = self.distiller(**given)
            else:
                logits, losses = self.parallel(given, self.train_loader.images_in(self.step_in_epoch))
        losses = {name: loss.mean() for name, loss in losses.items()}  # some methods return shape (1,)
        self.update(self.parallel.weighted(losses))
        detached = {name: loss.detach() for name, loss in losses.items()}
        monitors = dict(self.distiller.monitors)
        return StepOutput(batch, logits.detach(), detached, sum(detached.values()), monitors)

    def update(self, losses: dict[str, Tensor]) -> None:
        """One optimiser step down the sum of the losses.

        A trainer that does otherwise calls ``self.parallel.after_backward()`` after each ``backward()``, and states the
        number of these, for the case that several processes train.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(losses.values())).backward()
        self.parallel.after_backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def agree(self) -> None:
        """Before a model is evaluated or saved: the same BatchNorm statistics in all processes."""
        if self.averaged_at != self.step:
            self.averaged_at = self.step
            self.parallel.average_statistics(*(module for hook in self.hooks for module in hook.modules()))

    def _items(self) -> Iterator[Any]:
        """The rest of the epoch's items; how long each kept the loop waiting is told to the hooks."""
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(self.epoch, self.step_in_epoch)
        iterator = iter(self.train_loader)
        while True:
            start = time.perf_counter()
            item = next(iterator, None)
            if item is None:
                return
            self._call("data_arrived", time.perf_counter() - start)
            yield item

    def _call(self, moment: str, *args: Any) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(*args)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on exactly where it stands; the frozen teacher isn't part of it.

        Collective where several processes train; it is the first one's to save.
        """
        self.agree()
        random, *random_of_others = distributed.gather_objects(random_state())
        return {
            "epoch": self.epoch - 1,  # epochs finished, as mdistiller counts
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "row": self.row,
            "config": self.cfg.dump(),
            "versions": {"mdistiller": mdistiller.__version__, "torch": str(torch.__version__)},
            "model": trained_state(self.distiller),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "random_of_others": random_of_others,  # processes'
            "hooks": {type(hook).__name__: state for hook in self.hooks if (state := hook.state_dict())},
            "results": self.results,
        }

    def resume(self) -> None:
        """Go on from ``latest``; if it is damaged or not of this run, from the checkpoint before it.

        Raises:
            CheckpointError: neither can be used; says why for each.
        """
        latest, problems = self.folder / "latest", []
        for path in (latest, previous(latest)):
            try:
                state = distributed.on_first_process(functools.partial(load_checkpoint, path))
                with distributed.same_error():
                    self.load_state(state, str(path))
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warn(f"{problem}; going on from {path} instead")
            epochs = f"{self.epoch - 1} epoch{'' if self.epoch == 2 else 's'}"
            done = f"{epochs} and {self.step_in_epoch} of {self.steps_per_epoch} steps"
            say(f"Resuming from {path}: {done} are done")
            return
        raise CheckpointError(
            f"cannot resume: {'; and '.join(problems)}; start again by --overwrite, or name another folder with "
            "EXPERIMENT.NAME"
        )

    def load_state(self, state: dict[str, Any], source: str = "the state") -> None:
        """Take over a state; mdistiller's ``latest`` files (model, optimiser, epoch, best_acc) work too.

        Args:
            state: what :meth:`state_dict` gave.
            source: names it in messages.

        Raises:
            CheckpointError: a state without its parts, or of another model, method or run; nothing is changed then.
        """
        model = self._check_state(state, source)
        self.distiller.load_state_dict(model, strict=False)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        saved = zip(state["optimizer"]["param_groups"], settings, strict=True)
        # Weight decay and the like are the configuration's, as the learning rate is.
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": [group | own for group, own in saved]})
        self.epoch = state["epoch"] + 1
        self.step_in_epoch = state.get("step_in_epoch", 0)
        self.step = state.get("step", state["epoch"] * self.steps_per_epoch)
        self.row = state.get("row", {})
        self.results.update(state.get("results", {}))
        if "best_acc" in state:  # mdistiller's; it doesn't say which epoch that was
            self.results["best"] = {"top1": float(state["best_acc"]), "epoch": None, "split": "test"}
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        for hook in self.hooks:
            hook.load_state_dict(state.get("hooks", {}).get(type(hook).__name__, {}))
        self._restore_random_state(state)
        self.averaged_at = self.step

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        states = [state.get("random", {}), *state.get("random_of_others", [])]
        rank = 0 if self.cfg.SOLVER.GATHER else distributed.rank()
        if rank < len(states):
            restore_random_state(states[rank])
        else:  # there are more processes than before
            seed_process(self.cfg.EXPERIMENT.SEED, rank, self.step)

    def _check_state(self, state: Any, source: str) -> dict[str, Tensor]:
        """All that can be wrong with a state, before any of it is used; returns the model's part."""
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer"} <= set(state):
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(
                f"{source} cannot be resumed from: it must hold epoch, model and optimizer, and holds {found}"
            )
        if "config" in state:
            section = self.distiller.section
            fatal, _ = changed_keys(yaml.safe_load(state["config"]), self.cfg, section)
            if fatal:
                raise CheckpointError(f"{source} belongs to another experiment: {', '.join(fatal)}")
        check_optimizer_fit(self.optimizer, state["optimizer"], source)
        return fitting_state(self.distiller, state["model"], source)


trainer_dict["base"] = BaseTrainer
trainer_dict["crd"] = BaseTrainer  # mdistiller's name for the loop with an index in the batch
trainer_dict["ours"] = BaseTrainer  # and that of its fork MLLD, and of MLLD's forks, for the loop with two views


@contextmanager
def contract_explained(distiller: nn.Module, given: dict[str, Any]) -> Iterator[None]:
    """Around a method's step: where it fails, say if a loader's batches lack a part or a network returns no features.

    The library's loaders and networks do neither; those that a script brings may.

    Args:
        distiller: the method.
        given: what it is called with.

    Raises:
        InputError: in place of what Python says when such a batch or output is unpacked.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        lacking = [name for name in contract_of(type(distiller)).required if name not in given]
        method = type(distiller).__name__
        if lacking:
            raise InputError(
                f"{method} reads {', '.join(lacking)}, and the training batches hold "
                f"{', '.join(name for name in given if name != 'epoch')}; see mdistiller/engine/batch.py"
            ) from error
        images = next((value for name, value in given.items() if name.startswith("image")), None)
        for role in ("student", "teacher"):
            net = getattr(distiller, role, None)
            if net is not None and images is not None:
                _check_output(net, role, method, images, error)
        raise


def _check_output(net: nn.Module, role: str, method: str, images: Tensor, error: Exception) -> None:
    """Refuse a network whose output is not what ``mdistiller/models/_features.py`` says, or lacks what was read."""
    with torch.no_grad():
        output = net(images)
    what, advice = f"the {role} ({type(net).__name__})", "see mdistiller/models/_features.py"
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping)):
        raise InputError(
            f"{what} returns {type(output).__name__}; a network must return (logits, features), features being a "
            f"dictionary: {advice}"
        ) from error
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if key in ("feats", "preact_feats", "pooled_feat") and key not in output[1]:
        raise InputError(
            f"{method} reads features[{key!r}], which {what} does not return; it has {list(output[1])}: {advice}"
        ) from error


def trained_state(distiller: nn.Module) -> dict[str, Tensor]:
    """The distiller's state dict without what is frozen of the teacher."""
    moving, frozen = {id(p) for p in distiller.teacher_parameters()}, distiller.frozen_networks()
    trained = {f"{role}.{n}" for role, net in frozen.items() for n, p in net.named_parameters() if id(p) in moving}
    state = distiller.state_dict()
    return {key: value for key, value in state.items() if key.split(".")[0] not in frozen or key in trained}


def fitting_state(distiller: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Of a saved model what the distiller takes: mdistiller's ``module.`` prefix and saved teacher are dropped.

    Raises:
        CheckpointError: names or shapes differ from :func:`trained_state`.
    """
    own = trained_state(distiller)
    given = {key.removeprefix("module."): value for key, value in state.items()}
    frozen = distiller.frozen_networks()
    given = {key: value for key, value in given.items() if key in own or key.split(".")[0] not in frozen}
    check_fit(own, given, f"the model in {source}")
    return given


def check_optimizer_fit(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str) -> None:
    """Compare a saved optimiser state with the optimiser: groups, their sizes, the shapes of the moments.

    Raises:
        CheckpointError: they differ.
    """
    groups, saved = optimizer.param_groups, state.get("param_groups", [])
    sizes, saved_sizes = ([len(group["params"]) for group in part] for part in (groups, saved))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"the optimiser in {source} does not fit: it has groups of {saved_sizes} parameters, this run {sizes}"
        )
    parameters = [p for group in groups for p in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state.get("state", {}).get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimiser in {source} does not fit: {name} of parameter {number} is {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )


def check_batches(distiller: nn.Module, loader: Any, batch_norm_over: str = "local") -> None:
    """Refuse an epoch without steps, and a last batch of one image where BatchNorm needs several.

    Where several processes train, each needs a share of every batch, and BatchNorm of the process's own images
    (``batch_norm_over`` ``"local"``) several in each.

    Raises:
        InputError: what was found and which key to change.
    """
    if not len(loader):
        raise InputError(
            "an epoch has no step: there are fewer training images than SOLVER.BATCH_SIZE and SOLVER.DROP_LAST "
            "is on; lower SOLVER.BATCH_SIZE or turn SOLVER.DROP_LAST off"
        )
    world = distributed.world_size()
    if world > 1 and getattr(loader, "share", (0, 1))[1] != world:
        raise InputError(
            f"{world} processes train, and the training batches are not divided among them; take the loaders of "
            "build_loaders or get_dataset, made after mdistiller.engine.processes.distributed.start()"
        )
    smallest = getattr(loader, "last_batch_size", None)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in distiller.student.modules())
    if world > 1 and smallest < world * (2 if batch_norm and batch_norm_over == "local" else 1):
        raise InputError(
            f"the last batch of an epoch holds {smallest} images ({loader.num_data} training images, SOLVER.BATCH_SIZE "
            f"{loader.batch_size}), too few for {world} processes, each of which needs one, and two where BatchNorm "
            "takes its statistics from them; use another SOLVER.BATCH_SIZE, SOLVER.BATCH_NORM sync, or set "
            "SOLVER.DROP_LAST True"
        )
    if smallest == 1 and batch_norm:
        raise InputError(
            f"the last batch of an epoch holds a single image ({loader.num_data} training images, "
            f"SOLVER.BATCH_SIZE {loader.batch_size}), from which BatchNorm cannot take statistics; "
            "use another SOLVER.BATCH_SIZE, at least 2, or set SOLVER.DROP_LAST True"
        )
