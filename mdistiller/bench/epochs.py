"""Whole epochs of a common training loop and of a run of the library."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from mdistiller.dataset import open_dataset

from . import old_loop
from .subjects import Subject, build_subject, with_options

OLD = "old loop"
PLAIN = {"SOLVER__AMP": "off", "SOLVER__CHANNELS_LAST": False}


def with_epochs(cfg: Any, method: str, epochs: int) -> Any:
    """The configuration of a run of so many epochs without progress bar and TensorBoard steps."""
    return with_options(
        cfg,
        DISTILLER__TYPE=method,
        DATASET__LOADER="device",
        SOLVER__EPOCHS=epochs,
        LOG__PROGRESS="off",
        LOG__TENSORBOARD_FREQ=0,
    )


class OldRun:
    """Epochs of the old loop. Each epoch starts ``DATASET.NUM_WORKERS`` worker processes.

    The old loop runs in the process of our runs and uses the memory that they keep. This makes the old loop faster.

    Args:
        cfg: networks, data and optimiser; number format and speed-ups are ignored, the loop uses float32.
        folder: for its checkpoint.
    """

    def __init__(self, cfg: Any, folder: Path) -> None:
        cfg = with_options(cfg, **PLAIN, SOLVER__FAST_TEACHER=False, SOLVER__COMPILE="off")
        subject: Subject = build_subject(cfg, folder, num_batches=1)
        trainer, data = subject.trainer, subject.loaders.train.dataset
        kind, workers = open_dataset(cfg), cfg.DATASET.NUM_WORKERS
        self.device, self.distiller, self.number = trainer.precision.device, trainer.distiller, 0
        solver = cfg.SOLVER
        self.optimizer = torch.optim.SGD(
            self.distiller.get_learnable_parameters(), solver.LR, solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
        )
        pictures = old_loop.Pictures(data.split, data.views, *kind.normalisation)
        tests = old_loop.Pictures(subject.loaders.test.dataset.split, {"image": ("test", ())}, *kind.normalisation)
        self.train = DataLoader(
            pictures, solver.BATCH_SIZE, shuffle=True, num_workers=workers, drop_last=solver.DROP_LAST
        )
        self.test = DataLoader(tests, cfg.DATASET.TEST.BATCH_SIZE, num_workers=min(workers, 1))
        self.images_per_epoch = len(pictures)
        self.latest = folder / "latest"
        self.latest.parent.mkdir(parents=True, exist_ok=True)

    def epoch(self) -> None:
        self.number += 1
        old_loop.train_epoch(self.distiller, self.train, self.optimizer, self.number, self.device)
        old_loop.validate(self.distiller, self.test, self.device)
        torch.save({"model": self.distiller.state_dict(), "optimizer": self.optimizer.state_dict()}, self.latest)


class OwnRun:
    """Epochs of a run with all its hooks; measures the share of the time outside the steps."""

    def __init__(self, cfg: Any, folder: Path) -> None:
        self.trainer = build_subject(cfg, folder, num_batches=1).trainer
        self.trainer.folder.mkdir(parents=True)
        self.trainer._call("before_train")
        self.in_steps = self.total = 0.0
        self.run_step, self.trainer.run_step = self.trainer.run_step, self._timed_step
        self.evaluation = next(hook for hook in self.trainer.hooks if type(hook).__name__ == "Evaluate")

    def _timed_step(self, batch: dict[str, torch.Tensor]) -> Any:
        start = time.perf_counter()
        output = self.run_step(batch)
        self.in_steps += time.perf_counter() - start
        return output

    def epoch(self) -> None:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # each evaluation prints a line
            self.trainer.run_epoch()
        self.total += time.perf_counter() - start

    @property
    def outside_steps(self) -> float:
        """Share of the epochs' time besides steps and evaluation: data, meters, files."""
        return 1 - (self.in_steps + self.evaluation.clock.seconds["evaluation"]) / self.total

    @property
    def waiting_for_data(self) -> float:
        return self.evaluation.clock.seconds["data"] / self.total

    def close(self) -> None:
        for hook in self.trainer.hooks:
            hook.close()
