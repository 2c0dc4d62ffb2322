"""Defaults of mdistiller's forks, read from their files without executing the files.

Method files of forks hold no defaults. The defaults are in the fork's ``mdistiller/engine/cfg.py``, as
``CFG.A.B = 1.0``, or in ``__init__.py`` beside the method file.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from .messages import warn
from .registry import InputError

SHARED = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "EXPERIMENT": "PROJECT NAME TAG",
        "DATASET": "TYPE NUM_WORKERS TEST.BATCH_SIZE",
        "DISTILLER": "TYPE TEACHER STUDENT",
        "SOLVER": "TRAINER BATCH_SIZE EPOCHS LR LR_DECAY_STAGES LR_DECAY_RATE WEIGHT_DECAY MOMENTUM TYPE DOT.DELTA",
        "LOG": "TENSORBOARD_FREQ SAVE_CHECKPOINT_FREQ PREFIX WANDB",
    }.items()
    for key in keys.split()
)
"""mdistiller's keys in sections that all methods share. Their meaning is the same in a fork."""


def fork_defaults(file: Path, root: str = "") -> dict[str, Any]:
    """The defaults of a method file's fork, by dotted key.

    Args:
        file: the method file.
        root: the fork's folder; may be empty if ``file`` is in ``<fork>/mdistiller/distillers/``.

    Raises:
        InputError: ``root`` is no fork's folder.
    """
    config = _config_of(file, root)
    if config is None:
        return {}
    defaults: dict[str, Any] = {}
    for path in (config, file.with_name("__init__.py")):
        if path.is_file():
            defaults |= _literals(path)
    return defaults


def _config_of(file: Path, root: str) -> Path | None:
    """The fork's ``engine/cfg.py``."""
    if root:
        folder = Path(root).expanduser()
        for path in (folder / "mdistiller" / "engine" / "cfg.py", folder / "engine" / "cfg.py"):
            if path.is_file():
                return path
        raise InputError(
            f"DISTILLER.FORK {root} is no fork of mdistiller: there is no {folder / 'mdistiller/engine/cfg.py'}"
        )
    package = Path(__file__).resolve().parent
    for folder in file.parents:
        config = folder.parent / "engine" / "cfg.py"
        if folder.name == "distillers" and folder.parent != package and config.is_file():
            return config
    return None


@cache  # a run asks at each check of its settings
def _literals(path: Path) -> dict[str, Any]:
    """The literals in a file's assignments ``CFG.A.B = literal``, by ``"A.B"``."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, SyntaxError) as error:
        warn(f"cannot read the defaults in {path}: {error}")
        return {}
    literals = {}
    for node in [node for node in tree.body if isinstance(node, ast.Assign)]:
        root, parts = attribute_path(node.targets[0])
        if isinstance(root, ast.Name) and parts:
            with suppress(ValueError):  # a section, or an expression that is no literal
                literals[".".join(parts)] = ast.literal_eval(node.value)
    return literals


def attribute_path(node: ast.expr) -> tuple[ast.expr, list[str]]:
    """The expression ``x`` and ``["a", "b"]`` of ``x.a.b``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return node, parts
