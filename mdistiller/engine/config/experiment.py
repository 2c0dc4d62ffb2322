"""What makes two configurations one experiment: what may change when a run is resumed and what may not."""

from __future__ import annotations

from typing import Any

FIXED_ON_RESUME = (
    "DATASET.TYPE", "DATASET.IMAGE_SIZE", "DATASET.TRAIN_FRACTION", "DATASET.TRAIN_PER_CLASS", "DATASET.VAL_FRACTION",
    "DATASET.VIEW_WEAK", "DATASET.VIEW_STRONG", "DATASET.STRONG_N",
    "DATASET.SHAPES.TRAIN_SIZE", "DATASET.SHAPES.TEST_SIZE",
    "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT", "DISTILLER.ADD_KD", "DISTILLER.ADD_KD_TEMPERATURE",
    "EXPERIMENT.SEED", "EXPERIMENT.LOGIT_STAND",
    "SOLVER.TYPE", "SOLVER.TRAINER", "SOLVER.BATCH_SIZE", "SOLVER.DROP_LAST",
)  # fmt: skip


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"A": {"B": 1}}`` as ``{"A.B": 1}``; tuples become lists, as YAML keeps them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def changed_keys(before: dict[str, Any], now: dict[str, Any], section: str) -> tuple[list[str], list[str]]:
    """Compare two trees of settings; keys that only one of them has do not count.

    Args:
        before: the settings that the run was started with.
        now: those it is to go on with.
        section: the method's own, of which everything is part of the experiment.

    Returns:
        The changes that make it another experiment, and the others, each as ``"KEY was A, is B"``.
    """
    before, now = flatten(before), flatten(now)
    fatal, harmless = [], []
    for key in now:
        if key in before and before[key] != now[key]:
            part_of_it = key in FIXED_ON_RESUME or key.startswith(f"{section}.")
            (fatal if part_of_it else harmless).append(f"{key} was {before[key]}, is {now[key]}")
    return fatal, harmless


# What says where and how fast a run works, not what comes out of it.
WITHOUT_INFLUENCE = (
    "LOG.", "EXPERIMENT.PROJECT", "EXPERIMENT.NAME", "EXPERIMENT.TAG", "DATASET.ROOT", "DATASET.DOWNLOAD",
    "DATASET.NUM_WORKERS", "DATASET.LOADER", "DATASET.TEST.BATCH_SIZE", "SOLVER.DEVICE", "DISTILLER.TEACHER_CKPT",
)  # fmt: skip


def settings_of_result(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat settings that decide a run's result; of the teacher, its file counts rather than the path to it."""
    return {key: value for key, value in flatten(tree).items() if not key.startswith(WITHOUT_INFLUENCE)}
