"""Compares configurations: whether two are one experiment, and which changes a resumed run may have."""

from __future__ import annotations

from typing import Any, NamedTuple

from mdistiller.forks import SHARED, fork_defaults
from mdistiller.options import OPTIONS, Option, options_of
from mdistiller.plugins import method_file
from mdistiller.registry import distiller_dict

from .node import ConfigNode, convert, value_at

UNDECLARED = Option(None)  # a key that a method file of another project reads


class Change(NamedTuple):
    """A setting that differs between a run and what it is to go on with."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old}, is {self.new}"


def keys_of_fork(cfg: Any) -> list[str]:
    """Keys of ours that mean something else in the fork which the method's file comes from: the file reads them, the
    fork has them, and mdistiller has not (``SOLVER.ALPHA``)."""
    file = method_file(distiller_dict.get(cfg.DISTILLER.TYPE))
    if file is None:
        return []
    defaults = fork_defaults(file.path, cfg.DISTILLER.FORK)
    return [key for key in file.reads if key in defaults and key in OPTIONS and key not in SHARED]


def options_of_run(cfg: Any) -> dict[str, Option]:
    """The options by dotted key; a key of :func:`keys_of_fork` takes any value."""
    return {**options_of(cfg), **dict.fromkeys(keys_of_fork(cfg), UNDECLARED)}


def without_keys_of_fork(cfg: Any) -> Any:
    """The configuration as the library reads it: with our default for each key of :func:`keys_of_fork`."""
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
    """``{"A": {"B": 1}}`` as ``{"A.B": 1}``; tuples become lists, as YAML keeps them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def changed_keys(before: dict[str, Any], cfg: Any) -> tuple[list[Change], list[Change]]:
    """Compare the settings of a run with those that it is to go on with; keys that only one has do not count.

    Args:
        before: the settings that the run was started with.
        cfg: those that it is to go on with.

    Returns:
        The changes that make it another experiment, and the others.
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
    """Whether a run with the settings ``before`` gives what one of ``cfg`` would, as far as the settings tell.

    Of the teacher, its file counts rather than the path to it. A key that is newer than the run counts as its default.
    """
    options, method, now = options_of_run(cfg), distiller_dict[cfg.DISTILLER.TYPE], flatten(relevant_part(cfg))
    before = {**flatten({key: option.default for key, option in options.items()}), **flatten(before)}
    keys = [key for key in now if options.get(key, UNDECLARED).decides_result]
    if method.defaults is None:  # whose settings have no defaults, so that one that is gone counts
        keys += [key for key in before if key.startswith(f"{method.section}.")]
    return all(key in before and key in now and before[key] == now[key] for key in keys)
