"""Compares configurations: whether two of them are the same experiment, and which changes a resumed run may have."""

from __future__ import annotations

from typing import Any, NamedTuple

from mdistiller.forks import SHARED, fork_defaults
from mdistiller.options import OPTIONS, Option, options_of
from mdistiller.plugins import method_file
from mdistiller.registry import distiller_dict

from .node import ConfigNode, convert, value_at

UNDECLARED = Option(None)  # a key that a method file of another project reads


class Change(NamedTuple):
    """A setting that differs between a run and its continuation."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old}, is {self.new}"


def keys_of_fork(cfg: Any) -> list[str]:
    """Keys of the library with another meaning in the fork of the method's file, ``SOLVER.ALPHA`` for example.

    These are keys that the file reads and the fork defines, but not mdistiller.
    """
    file = method_file(distiller_dict.get(cfg.DISTILLER.TYPE))
    if file is None:
        return []
    defaults = fork_defaults(file.path, cfg.DISTILLER.FORK)
    return [key for key in file.reads if key in defaults and key in OPTIONS and key not in SHARED]


def options_of_run(cfg: Any) -> dict[str, Option]:
    """The options by dotted key; a key of :func:`keys_of_fork` takes any value."""
    return {**options_of(cfg), **dict.fromkeys(keys_of_fork(cfg), UNDECLARED)}


def without_keys_of_fork(cfg: Any) -> Any:
    """The configuration for the library: with the library's default for each key of :func:`keys_of_fork`."""
    keys = keys_of_fork(cfg)
    if keys:
        cfg = cfg.clone()
        for key in keys:
            section, _, name = key.rpartition(".")
            value_at(cfg, section)[name] = OPTIONS[key].default
    return cfg


def relevant_part(cfg: Any) -> ConfigNode:
    """The configuration without the sections of other methods."""
    if hasattr(cfg, "own_options"):
        return cfg
    part = ConfigNode({key: cfg[key] for key in ("EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG")})
    section = getattr(distiller_dict.get(cfg.DISTILLER.TYPE), "section", cfg.DISTILLER.TYPE)
    if section in cfg:
        part[section] = cfg[section]
    return part


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"A": {"B": 1}}`` as ``{"A.B": 1}``; tuples become lists, as in YAML files."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def changed_keys(before: dict[str, Any], cfg: Any) -> tuple[list[Change], list[Change]]:
    """Compare the settings of a run with the settings of its continuation. Keys that only one of them has are ignored.

    Args:
        before: the settings of the run's start.
        cfg: the settings of the continuation.

    Returns:
        The changes that make the continuation another experiment, and the other changes.
    """
    before, options = flatten(before), options_of_run(cfg)
    fatal, harmless = [], []
    for key, value in flatten(relevant_part(cfg)).items():
        if key in before and isinstance(value, str) and isinstance(before[key], bool):  # a switch of an earlier version
            before[key] = convert(before[key], value, key, "config.yaml")
        if key in before and before[key] != value:
            changes = fatal if options.get(key, UNDECLARED).fixed else harmless
            changes.append(Change(key, before[key], value))
    return fatal, harmless


def same_result(before: dict[str, Any], cfg: Any) -> bool:
    """Whether the settings ``before`` and ``cfg`` give runs with the same result.

    What a run found in place of ``auto`` equals ``auto``. The path of the teacher's file is not compared. A key that is
    newer than the run has its default.
    """
    options, method, now = options_of_run(cfg), distiller_dict[cfg.DISTILLER.TYPE], flatten(relevant_part(cfg))
    before = {**flatten({key: option.default for key, option in options.items()}), **flatten(before)}
    keys = [key for key in now if options.get(key, UNDECLARED).decides_result]
    if method.defaults is None:  # its settings have no defaults, so a removed key counts as a change
        keys += [key for key in before if key.startswith(f"{method.section}.")]

    def same(key: str) -> bool:
        settled = options.get(key, UNDECLARED).settled and now[key] in ("auto", ["auto"])
        return key in before and key in now and (settled or before[key] == now[key])

    return all(same(key) for key in keys)
