"""A run plan as data: which methods on which teacher-student pairs with which seeds.

A plan is a YAML file::

    TITLE: "one line for the reader"
    OUTPUT: "output/demo"                      # every run's folder lies below
    SEEDS: [0, 1, 2]
    PAIRS:
      res20_res8: {TEACHER: "configs/digits/vanilla/res20.yaml"}
    METHODS:
      "KD": {CONFIG: "configs/digits/kd/{pair}.yaml", OPTIONS: {KD.TEMPERATURE: 2}}
    OPTIONS: {SOLVER.AMP: "bf16"}              # for every run; optional
    CLAIMS: [["KD", "plain"]]                  # better, worse; optional
    HOW_TO_READ: "..."                         # printed below the table; optional

A pair with ``TEACHER`` has that config trained first, and its runs take ``student_last`` of it as their teacher;
a pair without uses the teacher that its configs name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mdistiller.engine.cfg import load_config
from mdistiller.engine.run import run_folder
from mdistiller.registry import InputError, suggestion

REQUIRED = ("TITLE", "OUTPUT", "SEEDS", "PAIRS", "METHODS")
OPTIONAL = ("OPTIONS", "CLAIMS", "HOW_TO_READ")


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
        """What the run prints, beside its folder."""
        return self.folder.with_name(self.folder.name + ".log")


@dataclass(frozen=True)
class Plan:
    """A plan read from a file; the fields are the keys of the module's docstring."""

    title: str
    output: Path
    seeds: list[int]
    pairs: dict[str, dict[str, str]]
    methods: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    claims: list[tuple[str, str]] = field(default_factory=list)
    how_to_read: str = ""

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
                    options = dict(recipe.get("OPTIONS", {}))
                    if "TEACHER" in facts:
                        checkpoint = teachers[facts["TEACHER"]].folder / "student_last"
                        options["DISTILLER.TEACHER_CKPT"] = str(checkpoint)
                    config = recipe["CONFIG"].format(pair=pair)
                    cells.append(self._cell(method, pair, seed, config, options))
        return cells

    def _cell(self, method: str, pair: str, seed: int, config: str, options: dict[str, Any]) -> Cell:
        name = f"{method}/{pair}/seed{seed}".replace(" ", "_").replace(",", "")
        own = {
            "LOG.PREFIX": str(self.output.parent),
            "EXPERIMENT.PROJECT": self.output.name,
            "EXPERIMENT.NAME": name,
            "EXPERIMENT.SEED": seed,
        }
        merged = {**self.options, **options, **own}
        return Cell(method, pair, seed, load_config(config, [part for item in merged.items() for part in item]))


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan.

    Raises:
        InputError: a missing or unreadable file, missing or unknown keys, a claim about no row.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no plan {path}; {suggestion(path.name, [p.name for p in path.parent.glob('*.yaml')])}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read plan {path}: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"plan {path} must hold the keys {', '.join(REQUIRED)}")
    for key in tree:
        if key not in REQUIRED + OPTIONAL:
            raise InputError(f"plan {path}: unknown key {key}; {suggestion(str(key), REQUIRED + OPTIONAL)}")
    missing = [key for key in REQUIRED if not tree.get(key)]
    if missing:
        raise InputError(f"plan {path} lacks {', '.join(missing)}")
    for method, recipe in tree["METHODS"].items():
        if not isinstance(recipe, dict) or "CONFIG" not in recipe or set(recipe) - {"CONFIG", "OPTIONS"}:
            raise InputError(f"plan {path}: METHODS {method!r} must hold CONFIG and may hold OPTIONS, not {recipe!r}")
    claims = [tuple(claim) for claim in tree.get("CLAIMS", [])]
    for claim in claims:
        unknown = [name for name in claim if name not in tree["METHODS"]]
        if len(claim) != 2 or unknown:
            raise InputError(f"plan {path}: a claim names two of {list(tree['METHODS'])}, not {list(claim)}")
    return Plan(
        title=tree["TITLE"],
        output=Path(tree["OUTPUT"]),
        seeds=[int(seed) for seed in tree["SEEDS"]],
        pairs={name: facts or {} for name, facts in tree["PAIRS"].items()},
        methods=tree["METHODS"],
        options=tree.get("OPTIONS", {}),
        claims=claims,
        how_to_read=tree.get("HOW_TO_READ", ""),
    )
