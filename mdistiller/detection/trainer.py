"""The library's training loop over rounds of steps: a detector's run is counted in steps, not in epochs."""

from __future__ import annotations

import bisect
import math
from typing import Any

from torch import Tensor

from mdistiller.engine.folder.checkpoint import saving
from mdistiller.engine.hooks import Hook
from mdistiller.engine.processes import distributed
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import InputError

from .pictures import save
from .task import Detection

PICTURES = "pictures.png"


class Iterations(Hook):
    """Adds the number of steps to the line of a round."""

    def after_epoch(self) -> None:
        self.trainer.row["iteration"] = self.trainer.step


class PicturesAtTheEnd(Hook):
    """Writes ``pictures.png``: some test pictures with the boxes of truth, teacher and student."""

    def after_train(self) -> None:
        trainer = self.trainer
        if distributed.is_first_process():
            teacher = trainer.distiller.outside
            networks = {} if teacher is None else {"teacher": teacher}
            networks["student"] = trainer.deployed
            with saving(trainer.folder / PICTURES):
                save(trainer.folder / PICTURES, trainer.task.data, networks, trainer.precision)


class DetectionTrainer(BaseTrainer):
    """Trains for ``SOLVER.MAX_ITER`` steps. A round, the engine's epoch, ends with an evaluation.

    Args:
        folder: of the run.
        distiller: the detector with its method.
        train_loader: batches in rounds.
        test_loader: the pictures that are scored.
        cfg: the engine's settings, see :func:`mdistiller.detection.run.engine_settings`.
        settings: the user's configuration.
        task: scores the pictures.
    """

    def __init__(
        self, folder: str, distiller: Any, train_loader: Any, test_loader: Any, cfg: Any, settings: Any, task: Detection
    ) -> None:
        self.user_settings, self.scorer = settings, task
        super().__init__(folder, distiller, train_loader, test_loader, cfg)

    @property
    def settings(self) -> Any:
        return self.user_settings

    def init_task(self, cfg: Any) -> Detection:
        return self.scorer

    def to_batch(self, item: dict[str, Any]) -> dict[str, Any]:
        device = self.precision.device
        targets = [{key: value.to(device) for key, value in t.items() if key != "id"} for t in item["target"]]
        return {**item, "image": [image.to(device).float() / 255 for image in item["image"]], "target": targets}

    def check_output(self, logits: Tensor, batch: dict[str, Any]) -> None:
        pass  # the task's meters take nothing of it

    def learning_rate(self) -> float:
        return learning_rate(self.user_settings.SOLVER, self.step)

    def progress(self) -> str:
        return f"Step {self.step}/{self.user_settings.SOLVER.MAX_ITER}"

    def remedies(self) -> tuple[str, str]:
        solver = self.user_settings.SOLVER
        lower = f"a lower SOLVER.BASE_LR than {solver.BASE_LR:g}"
        return lower + (" or SOLVER.AMP.ENABLED False" if solver.AMP.ENABLED else ""), "a longer SOLVER.WARMUP_ITERS"

    def load_state(self, state: dict[str, Any], source: str = "the state") -> None:
        super().load_state(state, source)
        before = sum(self.train_loader.steps[: self.epoch - 1]) + self.step_in_epoch
        if before != self.step:  # rounds have another length now
            ends = [sum(self.train_loader.steps[: number + 1]) for number in range(len(self.train_loader.steps))]
            rounds = bisect.bisect_right(ends, self.step)
            self.epoch, self.step_in_epoch = rounds + 1, self.step - (ends[rounds - 1] if rounds else 0)
            self.row["epoch"] = self.epoch

    def check_resumed(self) -> None:
        wanted = self.user_settings.SOLVER.MAX_ITER
        if self.step > wanted:
            raise InputError(f"{self.folder} has trained {self.step} steps, and SOLVER.MAX_ITER is {wanted}")


def learning_rate(solver: Any, step: int) -> float:
    """detectron2's rate before a step, counted from 0.

    ``WarmupMultiStepLR``: ``BASE_LR * GAMMA^n``, n the number of ``STEPS`` that are done. ``WarmupCosineLR``: half a
    cosine from ``BASE_LR`` to 0 over ``MAX_ITER`` steps. In the first ``WARMUP_ITERS`` steps it is multiplied by a
    factor that rises linearly from ``WARMUP_FACTOR`` to 1; the cosine's warm-up ends at the cosine's value there.
    """
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":

        def factor(done: float) -> float:
            return 0.5 * (1 + math.cos(math.pi * done / solver.MAX_ITER))
    else:

        def factor(done: float) -> float:
            return solver.GAMMA ** bisect.bisect_right(list(solver.STEPS), done)

    if step < solver.WARMUP_ITERS:
        end = factor(min(solver.WARMUP_ITERS, solver.MAX_ITER))
        start = solver.WARMUP_FACTOR * factor(0)
        return solver.BASE_LR * (start + (end - start) * step / solver.WARMUP_ITERS)
    return solver.BASE_LR * factor(step)
