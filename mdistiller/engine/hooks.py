"""Hooks: the work around the steps, one small class each, in the order of :func:`default_hooks`.

The trainer calls a hook's methods at the moments in their names. Hooks with a state save it with the run. Hooks write
measurements to ``trainer.row``, the epoch's line in the logs, and to ``trainer.results``, the content of
``results.json``. :func:`default_hooks` gives a hook the other hooks that it needs.

A script adds hooks by ``run(cfg, hooks=[...])``, a method file by ``HOOKS = [...]``; see :func:`add_hooks`.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mdistiller.messages import log_msg, say, warn
from mdistiller.registry import InputError, RunError

from .batch import images_of
from .deployed import deploys_whole
from .folder.checkpoint import (
    CheckpointError,
    check_fit,
    fingerprint,
    load_into,
    previous,
    save_checkpoint,
    write_atomically,
)
from .folder.state import NUMBER, ROW, check_kind
from .folder.writers import CsvWriter, TensorboardWriter, WandbWriter, WorklogWriter
from .processes import distributed
from .task import LOSS, Measure, Score

if TYPE_CHECKING:
    from .trainer import BaseTrainer, StepOutput


SPLITS = {"val": "validation", "test": "test"}


class NonFiniteLossError(RunError):
    """A loss or a weight is infinite or NaN. Such a state is never saved."""


class StopRequested(RuntimeError):
    """A SIGTERM or SIGINT has arrived, and the state is saved.

    Args:
        number: of the signal; a shell expects the exit code 128 + number.
        saved_to: the checkpoint.
    """

    def __init__(self, number: int, saved_to: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; --resume continues from {saved_to}")
        self.number = number


class Hook:
    """Base: does nothing and has no state.

    A state is saved under the name of the hook's class. It may hold tensors, numbers, texts and ``None``, in lists,
    tuples and dictionaries, since checkpoints are read without the execution of code.

    Args:
        trainer: the trainer of the hook's run. :func:`add_hooks` sets it for a hook that was made without.

    Attributes:
        state_kind: the kind of its state, see :mod:`.folder.state`.
    """

    state_kind: ClassVar[Any] = object

    def __init__(self, trainer: BaseTrainer | None = None) -> None:
        self.trainer = trainer

    def before_train(self) -> None: ...
    def before_epoch(self) -> None: ...
    def data_arrived(self, seconds: float) -> None: ...
    def before_step(self) -> None: ...
    def after_step(self, output: StepOutput) -> None: ...
    def after_epoch(self) -> None: ...
    def epoch_done(self) -> None: ...
    def after_train(self) -> None: ...
    def close(self) -> None: ...

    def modules(self) -> list[torch.nn.Module]:
        """Copies of the deployed network that the hook updates in training."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def check_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Refuse a state that :meth:`load_state_dict` cannot take, before anything of the run changes.

        Args:
            state: the file's state of this hook, empty if there is none.
            source: the file's name in messages.

        Raises:
            CheckpointError: the state is not of this hook's kind.
        """
        check_kind(state, self.state_kind, f"the state of {type(self).__name__} in {source}")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LearningRate(Hook):
    """Sets the rate of every parameter group before each step."""

    def before_step(self) -> None:
        trainer, rate = self.trainer, self.trainer.learning_rate()
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        trainer.row["lr"] = rate


class FoldAnew(Hook):
    """Folds frozen networks again after their weights have stopped changing.

    A network that changed in an epoch runs unfolded in the next epoch too. The state lists these networks, so a resumed
    run uses the folded twin in the same steps.
    """

    state_kind: ClassVar[Any] = {str: bool}

    def before_epoch(self) -> None:
        trainer = self.trainer
        for folding in trainer.foldings.values():
            if trainer.step_in_epoch == 0:  # else a resumed run continues the epoch
                # Before the first step only a stage before training may have changed the weights; the stage is over.
                folding.rests, folding.moved = trainer.step == 0 or not folding.moved, False
            folding.begin()

    def after_epoch(self) -> None:
        for folding in self.trainer.foldings.values():
            folding.look()

    def state_dict(self) -> dict[str, Any]:
        self.after_epoch()
        return {name: folding.moved for name, folding in self.trainer.foldings.items() if not folding.rests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, folding in self.trainer.foldings.items():
            folding.rests, folding.moved = name not in state, state.get(name, False)


class NonFiniteGuard(Hook):
    """Stops at a loss that is infinite or NaN, and before weights are saved that are, or give, such values.

    Losses are checked every step; on a GPU every 50 steps, since each check waits for the device. Weights are checked
    once for each save.
    """

    def before_train(self) -> None:
        self.interval = 50 if self.trainer.precision.device.type == "cuda" else 1
        self.unchecked: list[tuple[int, float, StepOutput]] = []
        self.saved_at = self.trainer.step  # number of steps of the state in latest

    def after_step(self, output: StepOutput) -> None:
        # only the indices are kept, since the images of many steps would fill the memory
        index = {key: value for key, value in output.batch.items() if key == "index"}
        output = dataclasses.replace(output, batch=index, logits=None)
        self.unchecked.append((self.trainer.step, self.trainer.row["lr"], output))
        if len(self.unchecked) >= self.interval:
            self.check()

    def after_epoch(self) -> None:
        self.check_state()

    def check(self) -> None:
        """Check the steps since the last check.

        Raises:
            NonFiniteLossError: with step, terms, learning rate and the indices of the images.
        """
        with distributed.same_error():
            self._check_losses()

    def check_state(self) -> None:
        """Check the weights too, before they are scored or saved.

        Raises:
            NonFiniteLossError: names the weights whose sum of squares is not finite.
        """
        with distributed.same_error():
            self._check_losses()
            trained = {id(p) for group in self.trainer.optimizer.param_groups for p in group["params"]}
            named = self.trainer.distiller.named_parameters()
            weights = {name: p for name, p in named if id(p) in trained and p.is_floating_point()}
            norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float32) for p in weights.values()]
            bad = [] if not norms else (~torch.isfinite(torch.stack(norms))).nonzero().flatten().tolist()
            if bad:
                name = list(weights)[bad[0]]
                more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                raise self.error(
                    f"the weights are not finite, or their squares are not, after step {self.trainer.step} (epoch "
                    f"{self.trainer.epoch}): {name}{more}",
                    self.trainer.step,
                )

    def check_score(self, score: Score) -> None:
        """Check the score on other images. Training may not show a fault of weights or statistics.

        Raises:
            NonFiniteLossError: the score's loss is not finite.
        """
        loss = score.values.get(LOSS.name, 0.0)
        if not math.isfinite(loss):
            raise self.error(
                f"the loss is not finite when the network is scored after step {self.trainer.step} (epoch "
                f"{self.trainer.epoch}): {loss} on {score.count} images",
                self.trainer.step,
            )

    def error(self, what: str, bad: int) -> NonFiniteLossError:
        """An error with the event, the last good state and advice.

        Args:
            what: the event.
            bad: number of steps since the first state that leads to the event.
        """
        latest = self.trainer.folder / "latest"
        earlier = previous(latest)
        remedies, warm_up = self.trainer.remedies()
        if latest.is_file() and self.saved_at < bad:
            left = f"{latest} holds the last good state; continue from it by --resume with {remedies}"
        elif earlier.is_file():
            left = (
                f"{latest} leads to the same event, and {earlier} holds the last good state; copy {earlier.name} over "
                f"{latest.name} and continue by --resume with {remedies}"
            )
        else:
            left = f"No good state is saved; start again with {remedies}, or with {warm_up}"
        return NonFiniteLossError(f"{what}. {left}")

    def _check_losses(self) -> None:
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked:
            return
        totals = torch.stack([output.total for _, _, output in unchecked])
        bad = (~torch.isfinite(totals)).nonzero()
        if len(bad):
            step, rate, output = unchecked[int(bad[0])]
            terms = ", ".join(f"{name} {value.item():g}" for name, value in output.losses.items())
            index = output.batch.get("index")
            images = "" if index is None else f"; images {index.tolist()}"
            raise self.error(
                f"the loss is not finite at step {step} (epoch {self.trainer.epoch}): {terms}; learning rate "
                f"{rate:g}{images}",
                step - 1,
            )


class Meters(Hook):
    """Training loss, its terms, the task's meters and the method's monitors: means over the epoch's images.

    The sums stay on the device and belong to this process. The epoch's line has the means over all processes.
    """

    state_kind: ClassVar[Any] = {"names": [str], "sums": (Tensor, type(None)), "count": int, "images_seen": int}

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__(trainer)
        self.names: list[str] = []
        self.sums: Tensor | None = None  # of the total, the task's meters and the values in names, each times images
        self.count = self.images_seen = 0

    def before_epoch(self) -> None:
        if self.trainer.step_in_epoch == 0:
            self.sums, self.count = None, 0

    def after_step(self, output: StepOutput) -> None:
        task = self.trainer.task
        target = output.batch[task.target]
        means = [output.total, *task.means(output.logits, target), *output.losses.values(), *output.monitors.values()]
        values = torch.stack([value.float() for value in means]).double() * len(target)
        self.names = [f"loss/{name}" for name in output.losses] + [f"monitor/{name}" for name in output.monitors]
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        self.count += len(target)
        of_one = self.trainer.distiller.student_images_per_sample
        self.images_seen += of_one * sum(len(image) for image in images_of(output.batch))

    def averages(self) -> dict[str, float]:
        """The means of this process so far in the epoch; waits for the device."""
        return {} if self.sums is None else self._named((self.sums / self.count).tolist())

    def _named(self, means: list[float]) -> dict[str, float]:
        loss, *others = means
        meters = [f"train_{meter.column}" for meter in self.trainer.task.meters]
        others.insert(len(meters), loss)
        return dict(zip([*meters, "train_loss", *self.names], others, strict=True))

    def after_epoch(self) -> None:
        sums, count, self.trainer.results["images_seen"] = self._of_all_processes()
        if sums is not None:
            self.trainer.row.update(self._named((sums / count).tolist()))

    def _of_all_processes(self) -> tuple[Tensor | None, int, int]:
        """Sums, their count, and images seen."""
        if distributed.world_size() == 1:
            return self.sums, self.count, self.images_seen
        count, images_seen = distributed.total(torch.tensor([self.count, self.images_seen])).tolist()
        return None if self.sums is None else distributed.total(self.sums), count, images_seen

    def state_dict(self) -> dict[str, Any]:
        sums, count, images_seen = self._of_all_processes()
        sums = None if sums is None else sums.cpu()
        return {"names": self.names, "sums": sums, "count": count, "images_seen": images_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_kind.keys() & state.keys():
            setattr(self, name, state[name])
        if not distributed.is_first_process():  # the first process continues the sums of all processes
            self.count = self.images_seen = 0
            self.sums = None if self.sums is None else torch.zeros_like(self.sums)


class Clock(Hook):
    """Seconds of each activity: waiting for data, training, evaluating. A resumed run continues the sums."""

    state_kind: ClassVar[Any] = {"seconds": {str: NUMBER}}

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__(trainer)
        self.seconds = {"data": 0.0, "train": 0.0, "evaluation": 0.0}
        self.epoch_start = self.data_in_epoch = 0.0
        self.within_steps = False

    def before_epoch(self) -> None:
        self.epoch_start, self.data_in_epoch = time.perf_counter(), 0.0
        self.within_steps = True

    def data_arrived(self, seconds: float) -> None:
        self.seconds["data"] += seconds
        self.data_in_epoch += seconds

    def after_epoch(self) -> None:
        self.seconds, self.within_steps = self._so_far(), False

    def epoch_done(self) -> None:
        self.trainer.results["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}

    def _so_far(self) -> dict[str, float]:
        running = time.perf_counter() - self.epoch_start if self.within_steps else 0.0
        return {**self.seconds, "train": self.seconds["train"] + running}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._so_far()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds.update(state.get("seconds", {}))


class WeightAverage(Hook):
    """Exponential moving average of the deployed network (``SOLVER.EMA_DECAY``), BatchNorm statistics included."""

    state_kind: ClassVar[Any] = {"average": {str: Tensor}}

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__(trainer)
        decay = trainer.cfg.SOLVER.EMA_DECAY
        self.average = AveragedModel(trainer.deployed, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def network(self) -> torch.nn.Module:
        return self.average.module

    def after_step(self, output: StepOutput) -> None:
        self.average.update_parameters(self.trainer.deployed)

    def modules(self) -> list[torch.nn.Module]:
        return [self.network]

    def after_train(self) -> None:
        state = {"model": self.network.state_dict()}
        distributed.on_first_process(lambda: save_checkpoint(state, self.trainer.folder / "student_ema"))

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def check_state_dict(self, state: dict[str, Any], source: str) -> None:
        super().check_state_dict(state, source)
        if state:
            check_fit(self.average.state_dict(), state.get("average", {}), f"the moving average in {source}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.average.load_state_dict(state["average"])


class Evaluate(Hook):
    """Scores the deployed network every ``LOG.EVAL_FREQ`` epochs and after the last, and keeps last, best and mean.

    *Last* is the honest headline. *Best* is chosen on the validation split; without one, on the test split, and then
    the results say so.
    """

    state_kind: ClassVar[Any] = {"scores": [[NUMBER]], "best_fingerprint": int}

    def __init__(
        self, trainer: BaseTrainer, weight_average: WeightAverage | None, clock: Clock, guard: NonFiniteGuard
    ) -> None:
        super().__init__(trainer)
        self.weight_average = weight_average
        self.clock, self.guard = clock, guard
        self.on_batch: Callable[[], None] | None = None
        self.scores: list[tuple[float, ...]] = []  # all values of each evaluation, the headline first
        self.prefix = "val" if trainer.test_loader is not None else "test"
        self.is_best = False
        self.best_fingerprint = 0  # of the network in student_best

    def before_train(self) -> None:
        if deploys_whole(type(self.trainer.distiller)):
            method = type(self.trainer.distiller).__name__
            warn(
                f"{method} predicts by its own forward_test and does not say which network predicts: the whole method "
                f"is scored, averaged and saved as the student. Define deployed(self) in {method}: it returns the "
                "network that predicts, self.student if forward_test calls only the student"
            )
        # Copied before the first step, because a method may keep a step's tensors, and such tensors cannot be copied.
        self.best = copy.deepcopy(self.trainer.deployed) if self.trainer.test_loader is not None else None

    def after_epoch(self) -> None:
        trainer, self.is_best = self.trainer, False
        if trainer.epoch % trainer.cfg.LOG.EVAL_FREQ and trainer.epoch != trainer.cfg.SOLVER.EPOCHS:
            return
        start = time.perf_counter()
        score = self.score(trainer.deployed, trainer.val_loader)
        self.guard.check_score(score)
        for measure in trainer.task.measures:
            trainer.row[f"{self.prefix}_{measure.column}"] = score.values[measure.name]
        if self.weight_average is not None:
            ema = self.score(self.weight_average.network, trainer.val_loader)
            trainer.row[f"{self.prefix}_{trainer.task.headline.column}_ema"] = ema.headline
            trainer.results["ema"] = _as_dict(ema, trainer.epoch, self.prefix)
        self.clock.seconds["evaluation"] += time.perf_counter() - start
        self._keep(score)

    def score(self, network: torch.nn.Module, loader: Any) -> Score:
        return self.trainer.task.evaluate(network, loader, self.trainer.precision, self.on_batch)

    def _keep(self, score: Score) -> None:
        trainer, headline = self.trainer, self.trainer.task.headline
        self.scores.append(tuple(score.values.values()))
        trainer.results["last"] = _as_dict(score, trainer.epoch, self.prefix)
        best = trainer.results.get("best", {}).get(headline.name)
        if best is None or headline.gain(score.headline, best) >= 0:  # a tie goes to the later, as in mdistiller
            self.is_best = True
            self.best_fingerprint = fingerprint(trainer.deployed.state_dict())
            trainer.results["best"] = _as_dict(score, trainer.epoch, self.prefix)
        recent = [value for value, *_ in self.scores[-trainer.cfg.LOG.MEAN_OF_LAST :]]
        trainer.results["mean_of_last"] = {
            "evaluations": len(recent),
            "split": SPLITS[self.prefix],
            headline.name: statistics.fmean(recent),
            "std": statistics.stdev(recent) if len(recent) > 1 else 0.0,
        }

    def after_train(self) -> None:
        """With a validation split: score last, best and average on the test split, for the first time."""
        trainer = self.trainer
        if trainer.test_loader is None:
            return
        results, scored = trainer.results, {"last": self.score(trainer.deployed, trainer.test_loader)}
        if self.weight_average is not None:
            scored["ema"] = self.score(self.weight_average.network, trainer.test_loader)
        try:
            scored["best"] = self.score(self._best_network(results["best"]["epoch"]), trainer.test_loader)
        except CheckpointError as error:
            warn(f"the best student is not scored on the test images: {error}", "EVAL")
            results["best"]["problem"] = str(error)
        # Changed after all scores, since a signal during the scoring saves the current results.
        results["validation"] = {key: dict(results[key]) for key in (*scored, "mean_of_last")}
        for key, score in scored.items():
            results[key] = _as_dict(score, results[key]["epoch"], "test")
        results["best"]["picked_on"] = "validation"

    def _best_network(self, epoch: int) -> torch.nn.Module:
        """The deployed network of the best epoch. The trained network does not change and may be saved at any time."""
        path, best = self.trainer.folder / "student_best", self.best

        def load() -> None:
            load_into(best, path, "student")
            if fingerprint(best.state_dict()) != self.best_fingerprint:
                raise CheckpointError(f"{path} is not the student of epoch {epoch}")

        distributed.on_first_process(load)
        distributed.broadcast_state(best)
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "best_fingerprint": self.best_fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = [tuple(score) for score in state.get("scores", [])]
        self.best_fingerprint = state.get("best_fingerprint", 0)


class TrainedTeacher(Hook):
    """Scores a partly trained teacher whenever the student is scored.

    Warns once, when the teacher has lost more than a point. ``results.json`` has its score before and after.
    """

    state_kind: ClassVar[Any] = {"before": (NUMBER, type(None)), "warned": bool}

    def __init__(self, trainer: BaseTrainer, evaluation: Evaluate) -> None:
        super().__init__(trainer)
        self.evaluation = evaluation
        self.before: float | None = None  # the headline before the first step, on the images of the later scores
        self.score: Score | None = None  # the last one
        self.warned = False

    @property
    def trains(self) -> bool:
        return bool(self.trainer.distiller.teacher_parameters())

    def before_train(self) -> None:
        trainer = self.trainer
        if trainer.step or not self.trains:
            return
        known = trainer.results.get("teacher", {}) if trainer.test_loader is None else {}
        name = trainer.task.headline.name
        self.before = known[name] if name in known else self._evaluate(trainer.val_loader).headline

    def after_epoch(self) -> None:
        trainer, headline, prefix = self.trainer, self.trainer.task.headline, self.evaluation.prefix
        if f"{prefix}_{headline.column}" not in trainer.row or not self.trains:
            return
        start = time.perf_counter()
        self.score = self._evaluate(trainer.val_loader)
        self.evaluation.clock.seconds["evaluation"] += time.perf_counter() - start
        trainer.row[f"{prefix}_{headline.column}_teacher"] = now = self.score.headline
        if self.warned or self.before is None or headline.unit != "%" or headline.gain(self.before, now) <= 1:
            return
        self.warned = True
        method = trainer.cfg.DISTILLER.TYPE
        warn(
            f"{method} trains the teacher in part; the teacher has {headline.label} {headline.text(now)} after epoch "
            f"{trainer.epoch}, and had {headline.text(self.before)} before: it should learn more slowly "
            "(docs/readings.md)",
            "EVAL",
        )

    def after_train(self) -> None:
        trainer = self.trainer
        if not self.trains:
            return
        if self.score is None or trainer.test_loader is not None:
            self.score = self._evaluate(trainer.test_loader or trainer.val_loader)
        facts, headline = trainer.results.setdefault("teacher", {}), trainer.task.headline
        facts["after"] = self.score.without_loss
        before = f", {headline.text(facts[headline.name])} before" if headline.name in facts else ""
        say(f"Teacher after training: {headline.label} {headline.text(self.score.headline)}{before}", "EVAL")

    def _evaluate(self, loader: Any) -> Score:
        return self.trainer.task.evaluate(self.trainer.distiller.teacher, loader, self.trainer.precision)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.warned = state.get("before"), state.get("warned", False)


def _as_dict(score: Score, epoch: int, split: str) -> dict[str, Any]:
    return {**score.values, "epoch": epoch, "images": score.count, "split": SPLITS[split]}


def _valid(value: Any) -> Any:
    """``value`` for JSON: ``None`` for a number that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: _valid(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Writers(Hook):
    """Gives each epoch's line to the log writers and keeps ``results.json`` up to date."""

    state_kind: ClassVar[Any] = {"rows": [ROW]}

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__(trainer)
        self.rows: list[dict[str, float]] = []
        self.writers: list[Any] = []

    def before_train(self) -> None:
        trainer = self.trainer
        self.writers = [
            CsvWriter(trainer.folder / "metrics.csv"),
            WorklogWriter(trainer.folder / "worklog.txt", trainer.task.measures),
            TensorboardWriter(trainer.folder / "train.events", trainer.cfg.LOG.TENSORBOARD_FREQ),
        ]
        if trainer.cfg.LOG.WANDB:
            self.writers.append(WandbWriter(trainer.cfg, trainer.folder, trainer.task.headline))
        for writer in self.writers:
            writer.start(self.rows, trainer.step)
        trainer.results.pop("stopped_by", None)
        self._write_results("running")

    def after_step(self, output: StepOutput) -> None:
        for writer in self.writers:
            writer.write_step(self.trainer.step, output.total, self.trainer.row["lr"])

    def after_epoch(self) -> None:
        row = dict(self.trainer.row)
        self.rows.append(row)
        for writer in self.writers:
            writer.write_epoch(row)

    def epoch_done(self) -> None:
        self._write_results("running")

    def after_train(self) -> None:
        results = self.trainer.results
        seconds = results.get("seconds", {})
        if seconds.get("train"):
            results["images_per_second"] = round(results["images_seen"] / seconds["train"], 1)
        device = self.trainer.precision.device
        if device.type == "cuda":
            results["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        for writer in self.writers:
            writer.finish(results)
        self._write_results("finished")

    def _write_results(self, status: str) -> None:
        content = {"status": status, **{k: v for k, v in self.trainer.results.items() if k != "status"}}
        self.trainer.results["status"] = status
        content |= {"epochs": self.trainer.epoch - 1, "steps": self.trainer.step}
        text = json.dumps(_valid(content), indent=1, allow_nan=False)
        write_atomically(self.trainer.folder / "results.json", text + "\n")

    def close(self) -> None:
        with ExitStack() as stack:  # closes every writer even if one fails
            for writer in self.writers:
                stack.callback(writer.close)
            if self.writers and self.trainer.results.get("status") == "running":
                self._write_results("stopped")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state.get("rows", [])


class Checkpoints(Hook):
    """Saves mdistiller's files after each epoch, ``latest`` within epochs on request, ``student_last`` at the end."""

    def __init__(self, trainer: BaseTrainer, evaluation: Evaluate, guard: NonFiniteGuard) -> None:
        super().__init__(trainer)
        self.evaluation, self.guard = evaluation, guard

    def after_step(self, output: StepOutput) -> None:
        every = self.trainer.cfg.LOG.SAVE_EVERY_STEPS
        if every and self.trainer.step % every == 0:
            self.save_latest()

    def save_latest(self) -> None:
        """Save the run's state, unless a loss before it is not finite."""
        self.guard.check_state()
        state, path = self.trainer.state_dict(), self.trainer.folder / "latest"
        distributed.on_first_process(lambda: save_checkpoint(state, path, keep_previous=True))
        self.guard.saved_at = self.trainer.step

    def epoch_done(self) -> None:
        trainer, finished = self.trainer, self.trainer.epoch - 1
        names = []
        if trainer.cfg.LOG.SAVE_CHECKPOINT_FREQ and finished % trainer.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0:
            names.append(str(finished))
        if self.evaluation.is_best:
            names.append("best")
        state, student = trainer.state_dict(), {"model": trainer.deployed.state_dict()}

        def save() -> None:
            for name in names:
                save_checkpoint(student, trainer.folder / f"student_{name}")
                save_checkpoint(state, trainer.folder / (f"epoch_{name}" if name.isdigit() else name))
            save_checkpoint(student, trainer.folder / "student_latest")
            if finished == trainer.cfg.SOLVER.EPOCHS:
                save_checkpoint(student, trainer.folder / "student_last")

        distributed.on_first_process(save)
        self.save_latest()  # last, so that the files of every epoch that latest counts are on the disk


class StopSignals(Hook):
    """SIGTERM and SIGINT: finish the step (in an evaluation, the batch), save and leave. A second signal kills.

    All processes leave after the same step, whichever of them got the signal. A second signal within ``ECHO`` seconds
    does not kill a process: torchrun repeats a signal to processes that already have it.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)
    ECHO = 10.0

    def __init__(self, trainer: BaseTrainer, checkpoints: Checkpoints) -> None:
        super().__init__(trainer)
        self.checkpoints = checkpoints
        self.received = 0
        self.received_at = 0.0
        self.anyone = distributed.DelayedMax()
        self.before: dict[int, Any] = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers in no other thread
            self.before = {number: signal.signal(number, self._receive) for number in self.NUMBERS}

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received:
            if distributed.world_size() > 1 and now - self.received_at < self.ECHO:
                return
            os._exit(128 + number)
        self.received, self.received_at = number, now
        message = f"{signal.Signals(number).name}: finishing the step and saving; a second signal ends at once\n"
        os.write(2, message.encode())  # standard error; print is not safe within a signal handler

    def check(self) -> None:
        """Leave if a signal has arrived.

        Raises:
            StopRequested: the state is saved.
        """
        number = self.anyone(self.received)
        if number:
            self.checkpoints.save_latest()
            raise StopRequested(number, self.trainer.folder / "latest")

    def after_step(self, output: StepOutput) -> None:
        self.check()

    def epoch_done(self) -> None:
        if self.trainer.epoch <= self.trainer.cfg.SOLVER.EPOCHS:  # a finished run needs no resuming
            self.check()

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.anyone.close()


class SameBuffers(Hook):
    """With several processes: warns after the first epoch if the method has buffers that differ between processes."""

    def epoch_done(self) -> None:
        if self.trainer.epoch == 2:
            self.trainer.parallel.warn_of_differing_buffers()


class Console(Hook):
    """Progress bar and the line of each evaluated epoch: scores, images a second, time left."""

    def __init__(self, trainer: BaseTrainer, meters: Meters, clock: Clock) -> None:
        super().__init__(trainer)
        self.meters, self.clock = meters, clock
        self.bar: Any = None
        self.shown_at = self.began = self.seconds_before = 0.0
        self.images_before = self.epochs = 0

    def before_epoch(self) -> None:
        self.began = self.began or time.perf_counter()
        self.images_before, self.seconds_before = self.meters.images_seen, self.clock.seconds["train"]
        progress = self.trainer.cfg.LOG.PROGRESS
        if progress == "on" or (progress == "auto" and sys.stderr.isatty()):
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.trainer.steps_per_epoch,
                initial=self.trainer.step_in_epoch,
                leave=False,
                dynamic_ncols=True,
            )

    def after_step(self, output: StepOutput) -> None:
        if self.bar is None:
            return
        self.bar.update()
        now = time.perf_counter()
        if now - self.shown_at < 0.5:  # reading the meters waits for the device
            return
        self.shown_at = now
        steps = self.bar.n - self.bar.initial
        data = self.clock.data_in_epoch / steps
        whole = (now - self.clock.epoch_start) / steps
        means = self.meters.averages()
        parts = [f"Epoch:{self.trainer.epoch}", f"Time(data):{data:.3f}", f"Time(train):{whole:.3f}"]
        for meter in (LOSS, *self.trainer.task.meters):
            parts.append(f"{meter.label.capitalize()}:{means[f'train_{meter.column}']:.{max(meter.digits, 3)}f}")
        self.bar.set_description(log_msg("| ".join(parts), "TRAIN"))

    def after_epoch(self) -> None:
        self.close()
        trainer, task = self.trainer, self.trainer.task
        self.epochs += 1
        images = (self.meters.images_seen - self.images_before) * distributed.world_size()
        rate = images / max(self.clock.seconds["train"] - self.seconds_before, 1e-9)
        left = (time.perf_counter() - self.began) / self.epochs * (trainer.cfg.SOLVER.EPOCHS - trainer.epoch)
        for split in ("val", "test"):
            if f"{split}_{task.headline.column}" in trainer.row:
                say(
                    f"{trainer.progress()}| lr {trainer.row['lr']:.4g}| "
                    f"{self._part('train', LOSS, task.headline)}| {self._part(split, LOSS, *task.measures)}| "
                    f"{rate:,.0f} images/s| {duration(left)} left",
                    "EVAL",
                )

    def _part(self, split: str, *measures: Measure) -> str:
        """The measures in the epoch's line: ``"train loss 0.1234, top-1 71.20"``."""
        row = self.trainer.row
        values = {m.name: row[f"{split}_{m.column}"] for m in measures if f"{split}_{m.column}" in row}
        return f"{split} {self.trainer.task.line(values)}"

    def after_train(self) -> None:
        results, headline = self.trainer.results, self.trainer.task.headline
        if "last" not in results:
            return
        last, best, seconds = results["last"], results["best"], self.clock.seconds
        say(
            f"Last: {headline.label} {headline.text(last[headline.name])} on {last['images']} {last['split']} "
            f"images| best (epoch {best['epoch']}, picked on the {best.get('picked_on', best['split'])} split): "
            f"{headline.text(best[headline.name])}| {duration(seconds['train'] + seconds['evaluation'])} of training "
            f"and evaluation| files in {self.trainer.folder}",
            "EVAL",
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds: float) -> str:
    """``1:02:03``, hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def default_hooks(trainer: BaseTrainer) -> list[Hook]:
    """The hooks of a run in the order of their calls."""
    meters, clock = Meters(trainer), Clock(trainer)
    average = WeightAverage(trainer) if trainer.cfg.SOLVER.EMA_DECAY else None
    guard = NonFiniteGuard(trainer)
    evaluation = Evaluate(trainer, average, clock, guard)
    checkpoints = Checkpoints(trainer, evaluation, guard)
    stop = StopSignals(trainer, checkpoints)
    evaluation.on_batch = stop.check
    hooks: list[Hook] = [clock, FoldAnew(trainer), LearningRate(trainer), guard, meters]
    hooks += [average] if average is not None else []
    hooks += [evaluation, TrainedTeacher(trainer, evaluation)]
    hooks += [Writers(trainer)] if distributed.is_first_process() else []
    hooks += [checkpoints, SameBuffers(trainer)]
    hooks += [Console(trainer, meters, clock)] if distributed.is_first_process() else []
    return [*hooks, stop]


def add_hooks(trainer: BaseTrainer, hooks: Iterable[Hook | type[Hook]]) -> None:
    """Add hooks of a script or of a method file.

    The trainer calls the added hooks in their order, after the hooks that measure and before :class:`Writers` and
    :class:`Checkpoints`. So after an epoch the added hooks find the scores in ``trainer.row`` and may add values to the
    row. Their state is saved and resumed. With several processes, each process has the hooks.

    Args:
        trainer: a trainer that has not started or resumed its training.
        hooks: classes, which are called with the trainer, or instances.

    Raises:
        InputError: an object that is no hook, or two hooks of one name.
    """
    names = {type(hook).__name__ for hook in trainer.hooks}
    place = next(n for n, hook in enumerate(trainer.hooks) if isinstance(hook, (Writers, Checkpoints)))
    for added in hooks:
        cls = added if isinstance(added, type) else type(added)
        if not issubclass(cls, Hook):
            raise InputError(f"{added!r} is no hook; derive its class from mdistiller.engine.hooks.Hook")
        if cls.__name__ in names:
            raise InputError(
                f"two hooks are called {cls.__name__}, and a hook's state is saved under its name; rename one class"
            )
        names.add(cls.__name__)
        hook = added(trainer) if added is cls else added
        hook.trainer = trainer
        trainer.hooks.insert(place, hook)
        place += 1
