"""Small runs on digits for the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mdistiller.engine.build import build_student
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import save_checkpoint
from mdistiller.engine.run import build_run
from mdistiller.engine.trainer import BaseTrainer

TINY = {
    "DATASET.TYPE": "digits",
    "DATASET.TRAIN_PER_CLASS": 3,
    "DATASET.NUM_WORKERS": 0,
    "DATASET.IMAGE_SIZE": 8,
    "DATASET.TEST.BATCH_SIZE": 300,
    "DISTILLER.STUDENT": "resnet8",
    "DISTILLER.TEACHER": "resnet8",
    "SOLVER.BATCH_SIZE": 8,  # 30 images: 4 steps, the last of 6 images
    "SOLVER.EPOCHS": 3,
    "SOLVER.LR_DECAY_STAGES": [2],
    "SOLVER.DEVICE": "cpu",
}


def tiny_config(folder: Path, **values: Any):
    """Defaults above, output in ``folder``; ``SOLVER__EPOCHS=2`` stands for ``SOLVER.EPOCHS``."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    merged = {**TINY, "LOG.PREFIX": str(folder), **given}
    return load_config(options=[part for item in merged.items() for part in item])


def teacher_file(folder: Path, name: str = "resnet8", classes: int = 10) -> str:
    """Random weights of a teacher, written to a file."""
    path = folder / f"{name}_{classes}"
    if not path.exists():
        options = ["DISTILLER.STUDENT", name, "EXPERIMENT.SEED", 5]
        save_checkpoint({"model": build_student(load_config(options=options), classes).state_dict()}, path)
    return str(path)


def make_trainer(folder: Path, **values: Any) -> BaseTrainer:
    """A trainer ready to run; its output folder exists."""
    trainer, facts = build_run(tiny_config(folder, **values))
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.results.update(facts)
    return trainer


def same_state(a: Any, b: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
