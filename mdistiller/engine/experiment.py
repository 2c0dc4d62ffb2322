"""What makes two configurations one experiment: what may change when a run is resumed and what may not."""

from __future__ import annotations

from typing import Any

FIXED_ON_RESUME = (
    "DATASET.TYPE", "DATASET.IMAGE_SIZE", "DATASET.TRAIN_FRACTION", "DATASET.TRAIN_PER_CLASS", "DATASET.VAL_FRACTION",
    "DATASET.SHAPES.TRAIN_SIZE", "DATASET.SHAPES.TEST_SIZE",
    "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT", "EXPERIMENT.SEED",
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


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two trees of settings; keys that only one of them has do not count.

    Returns:
        The changes that make it another experiment, and the others, each as ``"KEY was A, is B"``.
    """
    before, now = flatten(before), flatten(now)
    fatal, harmless = [], []
    for key in now:
        if key in before and before[key] != now[key]:
            (fatal if key in FIXED_ON_RESUME else harmless).append(f"{key} was {before[key]}, is {now[key]}")
    return fatal, harmless
