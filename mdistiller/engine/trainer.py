"""The training loop. Everything besides forward pass, backward pass and step is a hook."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
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
from .deployed import deployed_network
from .explain import check_batches, check_gradients, check_logits, contract_explained, read_output
from .folder.checkpoint import CheckpointError, load_checkpoint, previous
from .folder.state import STATE, check_kind, check_optimizer_fit, fitting_state, trained_state
from .forwards.cache import cache_teacher, caches_in_memory
from .forwards.compile import accelerate, begin_step
from .forwards.memory import remember_teacher
from .forwards.precision import Precision, hard_coded_cuda_explained
from .hooks import Hook, default_hooks
from .prepare import prepare
from .processes import distributed
from .processes.parallel import Parallel
from .random_state import random_state, restorable, restore_random_state, seed_process
from .solver import build_optimizer, learning_rate
from .task import Task, task_of

trainer_dict = Registry("trainer")


@dataclass(frozen=True)
class StepOutput:
    """The results of a step, for the hooks. Tensors are detached and stay on the device.

    Args:
        batch: the named tensors of the batch.
        logits: the student's, ``(B, K)``.
        losses: the method's weighted terms by name.
        total: their sum, ``()``.
        monitors: the method's further numbers, ``()`` each.
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
        distiller: the method with its networks. A DataParallel wrapper is removed.
        train_loader: yields dictionaries or mdistiller's tuples.
        val_loader: the split that compares epochs.
        cfg: the configuration.
        test_loader: the test split, if ``val_loader`` is a validation split. Last and best are scored on it once, at
            the end.
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
        self.cfg, self.task = cfg, self.init_task(cfg)
        self.precision = Precision.from_cfg(cfg)
        # The order matters in three places: first the device of the weights; then the foldings, since Parallel may
        # replace BatchNorms by synchronised ones, which cannot be folded; last the hooks, which read all other parts.
        self.distiller = self.precision.place(getattr(distiller, "module", distiller))
        self.foldings = accelerate(self.distiller, cfg)
        self.train_loader, self.val_loader, self.test_loader = train_loader, val_loader, test_loader
        keep = cache_teacher if caches_in_memory(cfg) else remember_teacher
        keeps = keep is cache_teacher or cfg.SOLVER.TEACHER_MEMORY == "disk"
        self.teacher_cache = keep(self.distiller, train_loader, cfg, self.precision) if keeps else None
        self.parallel = Parallel(
            self.distiller, cfg.SOLVER.GATHER, cfg.SOLVER.BATCH_NORM, overlap=self.backward_passes == 1
        )
        self.optimizer = self.init_optimizer(cfg)
        self.scaler = self.precision.scaler()
        self.folder = Path(cfg.LOG.PREFIX) / experiment_name
        self.epoch = 1  # the current epoch
        self.step_in_epoch = 0  # finished steps of the current epoch
        self.step = 0  # finished steps of the run
        self.row: dict[str, float] = {}  # the epoch's line in the logs, filled by the hooks
        self.results: dict[str, Any] = {}  # results.json, filled by the hooks
        self.contract = contract_of(type(self.distiller))
        self.hooks: list[Hook] = default_hooks(self)
        check_batches(self.distiller, train_loader, cfg.SOLVER.BATCH_NORM)
        self.outputs = 0  # number of the student's logits; 0: not known
        self.classes: Sequence[str] = ()  # their names, kept in the run's folder
        self.checked = False  # whether check_gradients has run
        self.averaged_at = 0  # the step after which the processes' statistics were last averaged

    @property
    def settings(self) -> Any:
        """The user's configuration, which the state holds. The loop reads ``cfg``."""
        return self.cfg

    def init_task(self, cfg: Any) -> Task:
        return task_of(cfg)

    def init_optimizer(self, cfg: Any) -> torch.optim.Optimizer:
        return build_optimizer(cfg, self.distiller)

    @property
    def deployed(self) -> nn.Module:
        """The network that is scored, averaged and saved as the student."""
        return deployed_network(self.distiller)

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch > self.cfg.SOLVER.EPOCHS

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    def train(self, resume: bool = False) -> dict[str, Any]:
        """Run all epochs and return the results.

        Args:
            resume: continue from ``latest`` in the run's folder.
        """
        distributed.on_first_process(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        if resume:
            self.resume()
        if self.step == 0 and distributed.on_first_process((self.folder / "latest").exists):
            raise InputError(
                f"{self.folder} holds a run already; continue the run by resume=True, or give another name"
            )
        if self.step == 0:  # else the state has the result
            prepare(self)
        try:
            self._call("before_train")
            while not self.finished:
                self.run_epoch()
            self._call("after_train")
        except BaseException as error:
            self.results["stopped_by"] = f"{type(error).__name__}: {error}"[:500]
            for problem in self._close():
                if not isinstance(error, type(problem)):  # the same error again, a full disk for example, is no news
                    warn(f"{type(problem).__name__} while the run was ending: {problem}")
            raise
        if problems := self._close():
            raise problems[0]
        return self.results

    def _close(self) -> list[Exception]:
        """Close all hooks and return their errors."""
        problems = []
        for hook in self.hooks:
            try:
                hook.close()
            except Exception as problem:
                problems.append(problem)
        return problems

    def run_epoch(self) -> None:
        self.distiller.train()
        if self.step_in_epoch == 0:  # else a resumed run continues the epoch
            self.row = {"epoch": self.epoch}
        self.distiller.on_epoch_start(self.epoch)
        self._call("before_epoch")
        self.parallel.begin_epoch()
        for item in self._items():
            self._call("before_step")
            output = self.run_step(self.to_batch(item))
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

    def to_batch(self, item: Any) -> dict[str, Any]:
        """A loader's item as named values on the device."""
        return to_batch(item, self.precision)

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return learning_rate(self.cfg.SOLVER, self.epoch, self.step_in_epoch / self.steps_per_epoch)

    def progress(self) -> str:
        """Where the run stands at the end of an epoch: ``"Epoch 3/240"``."""
        return f"Epoch {self.epoch}/{self.cfg.SOLVER.EPOCHS}"

    def remedies(self) -> tuple[str, str]:
        """What to do about a loss that is not finite: a lower rate, and for a new start also a warm-up."""
        solver = self.cfg.SOLVER
        lower = f"a lower SOLVER.LR than {solver.LR:g}" + (" or SOLVER.AMP off" if solver.AMP != "off" else "")
        return lower, "SOLVER.WARMUP_EPOCHS"

    def check_output(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Refuse an output that the task's meters cannot be taken of."""
        check_logits(self.distiller, logits, batch["target"], self.outputs)

    def run_step(self, batch: dict[str, Tensor]) -> StepOutput:
        inputs = self.contract.inputs(batch, self.epoch)
        begin_step(self.cfg)
        known = nullcontext() if self.teacher_cache is None else self.teacher_cache.of(batch, self.epoch)
        with known, self.precision.autocast(), hard_coded_cuda_explained(self.precision.device):
            if distributed.world_size() == 1:
                with contract_explained(self.distiller, inputs):
                    output = self.distiller(**inputs)
                logits, losses = read_output(self.distiller, output)
            else:
                logits, losses = self.parallel(inputs, self.train_loader.images_in(self.step_in_epoch))
        self.check_output(logits, batch)
        losses = {name: loss.mean() for name, loss in losses.items()}  # some methods return shape (1,)
        if not self.checked:
            self.checked = True
            check_gradients(self.distiller, losses, self.optimizer)
        self.update(self.parallel.weighted(losses))
        detached = {name: loss.detach() for name, loss in losses.items()}
        monitors = dict(self.distiller.monitors)
        return StepOutput(batch, logits.detach(), detached, sum(detached.values()), monitors)

    def update(self, losses: dict[str, Tensor]) -> None:
        """One optimiser step on the sum of the losses.

        A trainer with another ``update`` calls ``self.parallel.after_backward()`` after each ``backward()`` and
        declares their number. Several processes need both.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(losses.values())).backward()
        self.parallel.after_backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def agree(self) -> None:
        """Give all processes the same BatchNorm statistics, before a model is evaluated or saved."""
        if self.averaged_at != self.step:
            self.averaged_at = self.step
            self.parallel.average_statistics(*(module for hook in self.hooks for module in hook.modules()))

    def _items(self) -> Iterator[Any]:
        """The remaining items of the epoch. Hooks are told how long the loop waited for each."""
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
        """The state that a run needs to continue exactly, without the frozen teacher.

        Collective with several processes; the first process saves the state.
        """
        self.agree()
        random, *random_of_others = distributed.gather_objects(random_state())
        return {
            "epoch": self.epoch - 1,  # epochs finished, as mdistiller counts
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "row": self.row,
            "config": self.settings.dump(),
            "versions": {"mdistiller": mdistiller.__version__, "torch": str(torch.__version__)},
            "model": trained_state(self.distiller),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "random_of_others": random_of_others,  # of the other processes
            "hooks": {type(hook).__name__: state for hook in self.hooks if (state := hook.state_dict())},
            "results": self.results,
        }

    def resume(self) -> None:
        """Continue from ``latest``, or from the checkpoint before it if ``latest`` is damaged or of another run.

        Raises:
            CheckpointError: neither can be used; the message has the reason for each.
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
                warn(f"{problem}; continuing from {path} instead")
            further, steps = divmod(self.step_in_epoch, self.steps_per_epoch)
            done = f"{(epochs := self.epoch - 1 + further)} epoch{'' if epochs == 1 else 's'}"
            more = f" and {steps} of {self.steps_per_epoch} steps" if steps else ""
            say(f"Resuming from {path}: {done}{more} {'is' if epochs == 1 and not steps else 'are'} done")
            self._say_changes(yaml.safe_load(state.get("config", "{}")))
            return
        raise CheckpointError(
            f"cannot resume: {'; and '.join(problems)}; start again by --overwrite, or name another folder with "
            "EXPERIMENT.NAME"
        )

    def check_resumed(self) -> None:
        """Refuse to go on with fewer epochs than are done.

        Raises:
            InputError: says how many are needed.
        """
        begun, wanted = self.epoch - (self.step_in_epoch == 0), self.cfg.SOLVER.EPOCHS
        scored = self.results.get("last", {}).get("epoch", 0)
        if begun > wanted or (begun == wanted and self.step_in_epoch == 0 and scored < wanted):
            raise InputError(
                f"{self.folder} has trained {begun} epochs{'' if begun > wanted else ', the last one not evaluated'}, "
                f"and SOLVER.EPOCHS is {wanted}; give at least {begun + (begun == wanted)}"
            )

    def _say_changes(self, before: dict[str, Any]) -> None:
        changes = [str(change) for change in changed_keys(before, self.settings)[1]]
        if self.finished:
            say("; ".join(["all epochs are done and nothing is trained", *(f"without effect: {c}" for c in changes)]))
        else:
            for change in changes:
                say(f"resuming although {change}")

    def load_state(self, state: dict[str, Any], source: str = "the state") -> None:
        """Load a state. mdistiller's ``latest`` files (model, optimiser, epoch, best_acc) work too.

        Args:
            state: a state of :meth:`state_dict`.
            source: the state's name in messages.

        Raises:
            CheckpointError: a state without its parts, or of another model, method or run. Then nothing is changed.
        """
        model = self._check_state(state, source)
        self.distiller.load_state_dict(model, strict=False)
        # Weight decay and other settings come from the configuration, the rate from the state until the next step.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        pairs = zip(state["optimizer"]["param_groups"], settings, strict=True)
        groups = [saved | configured | {"lr": saved.get("lr", configured["lr"])} for saved, configured in pairs]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.epoch = state["epoch"] + 1
        self.step_in_epoch = state.get("step_in_epoch", 0)
        self.step = state.get("step", state["epoch"] * self.steps_per_epoch)
        self.row = state.get("row", {})
        self.results.update(state.get("results", {}))
        if "best_acc" in state:  # a file of mdistiller, without the number of the best epoch
            self.results["best"] = {self.task.headline.name: float(state["best_acc"]), "epoch": None, "split": "test"}
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        for hook in self.hooks:
            hook.load_state_dict(_state_of(hook, state))
        self._restore_random_state(state)
        self.averaged_at = self.step

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        random = self._own_random_state(state)
        if random is not None:
            restore_random_state(random)
        else:  # the run has more processes than before
            seed_process(self.cfg.EXPERIMENT.SEED, distributed.rank(), self.step)

    def _own_random_state(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """This process's part of a state."""
        states = [state.get("random", {}), *state.get("random_of_others", [])]
        rank = 0 if self.cfg.SOLVER.GATHER else distributed.rank()
        return states[rank] if rank < len(states) else None

    def _check_state(self, state: Any, source: str) -> dict[str, Tensor]:
        """Check a state before any part of it is used; return the model's part."""
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer"} <= set(state):
            content = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(
                f"{source} cannot be resumed from: it must hold epoch, model and optimizer, and holds {content}"
            )
        check_kind(state, STATE, source)
        if min(state.get(key, 0) for key in ("epoch", "step", "step_in_epoch")) < 0:
            raise CheckpointError(f"{source} cannot be resumed from: its epochs or steps are negative")
        if "config" in state:
            fatal, _ = changed_keys(_read_config(state["config"], source), self.settings)
            if fatal:
                raise CheckpointError(f"{source} belongs to another experiment: {', '.join(map(str, fatal))}")
        check_optimizer_fit(self.optimizer, state["optimizer"], source)
        if missing := self.scaler.state_dict().keys() - (state.get("scaler") or self.scaler.state_dict()).keys():
            raise CheckpointError(f"{source} cannot be resumed from: scaler lacks {', '.join(sorted(missing))}")
        if not restorable(self._own_random_state(state) or {}):
            raise CheckpointError(f"{source} cannot be resumed from: random is no state of the random generators")
        for hook in self.hooks:
            hook.check_state_dict(_state_of(hook, state), source)
        return fitting_state(self.distiller, state["model"], source)


def _state_of(hook: Hook, state: dict[str, Any]) -> dict[str, Any]:
    return state.get("hooks", {}).get(type(hook).__name__, {})


def _read_config(text: str, source: str) -> dict[str, Any]:
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        content = yaml.safe_load(text)
        if isinstance(content, dict):
            return content
    raise CheckpointError(f"{source} cannot be resumed from: config is no configuration")


trainer_dict["base"] = BaseTrainer
trainer_dict["crd"] = BaseTrainer  # mdistiller's name for the loop with an index in the batch
trainer_dict["ours"] = BaseTrainer  # the name in the fork MLLD and in its forks for the loop with two views
