"""A run plan as data: methods, teacher-student pairs and seeds.

A plan is a YAML file::

    TITLE: "one line for the reader"
    OUTPUT: "output/demo"                      # the folder that holds every run's folder
    SEEDS: [0, 1, 2]
    PAIRS:                                     # TEACHER and OPTIONS are optional
      res20_res8: {TEACHER: "configs/digits/vanilla/res20.yaml", OPTIONS: {SOLVER.LR: 0.05}}
    METHODS:                                   # OPTIONS is optional
      "KD": {CONFIG: "configs/digits/kd/{pair}.yaml", OPTIONS: {KD.TEMPERATURE: 2}}
    OPTIONS: {SOLVER.AMP: "bf16"}              # for every run; optional
    CLAIMS: [["KD", "plain"]]                  # better, worse; optional. With a number, [one, other, 0.5]: the mean
                                               # difference, seed by seed, is at most this number of points
    HOW_TO_READ: "..."                         # printed below the table; optional

If a pair has ``TEACHER``, the runner first trains this config; its ``student_last`` is the teacher of the pair's runs.
A pair without ``TEACHER`` uses the teacher of its configs. A pair's ``OPTIONS`` hold for its runs in the table, not for
its teacher. If a key is set several times, the method's value counts, then the pair's, then the plan's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mdistiller.engine.cfg import load_config
from mdistiller.engine.config.node import config_path, files_nearby, read_yaml
from mdistiller.engine.folder.run_folder import run_folder
from mdistiller.engine.task import Classification, Measure, task_of
from mdistiller.registry import InputError, suggestion

REQUIRED = {"TITLE": str, "OUTPUT": str, "SEEDS": list, "PAIRS": dict, "METHODS": dict}
OPTIONAL = {"OPTIONS": dict, "CLAIMS": list, "HOW_TO_READ": str}
KINDS = {str: "a text", list: "a list", dict: "keys with values"}


@dataclass(frozen=True)
class Cell:
    """One run of a plan: its place in the table and its configuration."""

    method: str
    pair: str
    seed: int
    cfg: Any

    @property
    def folder(self) -> Path:
        return run_folder(self.cfg)

    @property
    def console(self) -> Path:
        """The file of the run's printed output, beside its folder."""
        return self.folder.with_name(self.folder.name + ".log")


@dataclass(frozen=True)
class Plan:
    """A plan read from a file; the fields are the keys of the module's docstring."""

    title: str
    output: Path
    seeds: list[int]
    pairs: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    claims: list[tuple[str, str] | tuple[str, str, float]] = field(default_factory=list)
    how_to_read: str = ""
    headline: Measure = Classification().headline  # the measure that compares the runs
    allow_plugins: bool = False  # code that the plan and its configs name may be executed

    def teachers(self) -> dict[str, Cell]:
        """The runs that train the pairs' teachers, by their config; several pairs may share one."""
        configs = {pair["TEACHER"] for pair in self.pairs.values() if "TEACHER" in pair}
        return {config: self._cell("teacher", Path(config).stem, 0, config, {}) for config in sorted(configs)}

    def cells(self) -> list[Cell]:
        """The runs of the table: by seed, then method, then pair, so that early results cover all methods."""
        teachers = self.teachers()
        cells = []
        for seed in self.seeds:
            for method, recipe in self.methods.items():
                for pair, facts in self.pairs.items():
                    options = facts.get("OPTIONS", {}) | recipe.get("OPTIONS", {})
                    if "TEACHER" in facts:
                        checkpoint = teachers[facts["TEACHER"]].folder / "student_last"
                        options["DISTILLER.TEACHER_CKPT"] = str(checkpoint)
                    config = recipe["CONFIG"].replace("{pair}", pair)
                    cells.append(self._cell(method, pair, seed, config, options))
        return cells

    def _cell(self, method: str, pair: str, seed: int, config: str, options: dict[str, Any]) -> Cell:
        name = f"{method}/{pair}/seed{seed}".replace(" ", "_").replace(",", "")
        identity = {
            "LOG.PREFIX": str(self.output.parent),
            "EXPERIMENT.PROJECT": self.output.name,
            "EXPERIMENT.NAME": name,
            "EXPERIMENT.SEED": seed,
        }
        merged = {**self.options, **options, **identity}
        try:
            settings = [part for item in merged.items() for part in item]
            cfg = load_config(config, settings, allow_plugins=self.allow_plugins, source="OPTIONS")
        except InputError as error:
            raise InputError(f"{method}, {pair}: {error}") from None
        return Cell(method, pair, seed, cfg)


def load_plan(path: str | Path, allow_plugins: bool = False) -> Plan:
    """Read and check a plan and the configurations of all its runs.

    Args:
        path: the file.
        allow_plugins: see :func:`mdistiller.engine.cfg.load_config`.

    Raises:
        InputError: the file is missing or unreadable; a key is missing or unknown, or has a wrong value; a claim names
            an unknown row; a run's configuration is invalid; or two runs share a folder.
    """
    path = config_path(Path(path))
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"no plan {path}; {files_nearby(path)}") from None
    try:
        return _plan_from(tree, allow_plugins)
    except InputError as error:
        raise InputError(f"plan {path}: {error}") from None


def _plan_from(tree: Any, allow_plugins: bool) -> Plan:
    _check_tree(tree)
    if ".." in Path(tree["OUTPUT"]).parts:
        raise InputError(f"OUTPUT {tree['OUTPUT']!r} must not lead out of the current folder; leave out '..'")
    plan = Plan(
        title=tree["TITLE"],
        output=Path(tree["OUTPUT"]),
        seeds=tree["SEEDS"],
        pairs={name: facts or {} for name, facts in tree["PAIRS"].items()},
        methods=tree["METHODS"],
        options=tree.get("OPTIONS", {}),
        claims=[tuple(claim) for claim in tree.get("CLAIMS", [])],
        how_to_read=tree.get("HOW_TO_READ", ""),
        allow_plugins=allow_plugins,
    )
    owners: dict[Path, Cell] = {}
    for cell in [*plan.teachers().values(), *plan.cells()]:
        other = owners.setdefault(cell.folder, cell)
        if other is not cell:
            raise InputError(f"{other.method!r} and {cell.method!r} on {cell.pair} share the folder {cell.folder}")
    headlines = {task_of(cell.cfg).headline: cell.cfg.DATASET.TYPE for cell in plan.cells()}
    if len(headlines) > 1:
        measures = " and ".join(f"{headline.label} on {dataset}" for headline, dataset in headlines.items())
        raise InputError(f"one table cannot show runs that are scored by {measures}; write one plan for each")
    return replace(plan, headline=next(iter(headlines)))


def _check_tree(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise InputError(f"the file must hold the keys {', '.join(REQUIRED)}")
    known = REQUIRED | OPTIONAL
    for key, value in tree.items():
        if key not in known:
            raise InputError(f"unknown key {key}; {suggestion(str(key), known)}")
        if not isinstance(value, known[key]):
            raise InputError(f"{key} takes {KINDS[known[key]]}, not {value!r}")
    missing = [key for key in REQUIRED if not tree.get(key)]
    if missing:
        raise InputError(f"the file lacks {', '.join(missing)}")
    if not all(type(seed) is int for seed in tree["SEEDS"]):
        raise InputError(f"SEEDS takes whole numbers, not {tree['SEEDS']}")
    for name, entry in tree["PAIRS"].items():
        if not (_is_name(name) and _fits({} if entry is None else entry, {"TEACHER": str, "OPTIONS": dict})):
            raise InputError(
                f"PAIRS: {name!r} must be a name and may hold TEACHER with a config, and OPTIONS, not {entry!r}"
            )
    for name, entry in tree["METHODS"].items():
        if not (_is_name(name) and _fits(entry, {"CONFIG": str, "OPTIONS": dict}) and "CONFIG" in entry):
            raise InputError(f"METHODS: {name!r} must be a name and hold CONFIG, and may hold OPTIONS, not {entry!r}")
    for claim in tree.get("CLAIMS", []):
        if not _is_claim(claim, tree["METHODS"]):
            raise InputError(
                f"a claim names two of {list(tree['METHODS'])}, and may give the largest difference in points, "
                f"not {claim}"
            )
    # format() alone is no safe check: "{images:999999999}" fills the memory.
    if re.search(r"[{}]", re.sub(r"\{(images|image_points(:\.\df)?)\}", "", tree.get("HOW_TO_READ", ""))):
        raise InputError("HOW_TO_READ may hold {images} and {image_points} or {image_points:.2f}, and no other braces")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _is_claim(claim: Any, methods: dict[str, Any]) -> bool:
    if not isinstance(claim, list) or not 2 <= len(claim) <= 3:
        return False
    names, limit = claim[:2], claim[2:]
    return all(isinstance(name, str) and name in methods for name in names) and all(
        type(x) in (int, float) and x >= 0 for x in limit
    )


def _fits(entry: Any, kinds: dict[str, type]) -> bool:
    """Whether ``entry`` is a mapping with no other keys than these, and each value has its type."""
    return isinstance(entry, dict) and all(isinstance(value, kinds.get(key, ())) for key, value in entry.items())
