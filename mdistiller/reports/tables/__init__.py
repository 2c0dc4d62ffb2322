"""The result tables of the papers of VRM, MDR, DIST+ and DCD as data, and what this library has measured.

Each YAML file holds a list of tables, ``vrm.yaml`` those with ids such as ``vrm/tab1``. Numbers are the papers', typed
off the text of the documents; every reading that is not certain says so in its row's ``doubts``.

A table has ``id``, ``paper``, ``number``, ``where`` (main or supplement), ``caption``, ``dataset``, ``metric``,
``direction`` (whether ``higher`` or ``lower`` is better), ``conditions``, ``columns``, ``rows``, and perhaps
``derived_rows`` (printed differences) and ``notes``.

- A column has mostly ``teacher, student, teacher_acc, student_acc``; ``metric`` where a table mixes several; and what
  its paper varies (:data:`COLUMN_KEYS`). Networks have mdistiller's names on CIFAR-100, torchvision's on ImageNet.
- A row has ``method``, one name over all files (``printed_as`` where the paper has another), and ``values``, one for
  each column, ``null`` for none; ``ours`` marks the paper's own method, ``retrained_teacher`` its dagger.
- A doubt has ``col`` (number of the column, or ``row`` for all), ``printed``, ``note`` and ``status``: ``confirmed`` (a
  lost decimal point, and another table has the number), ``likely`` (the same without a second source), ``split`` (cells
  that ran together), ``name`` (a label), ``inconsistent`` (two documents disagree), ``suspicious`` (legible and
  implausible), ``rounding``, ``wrong_in_paper_or_ocr`` (to be treated as missing).
- ``differs``: another paper has another number for a known reason.

``measured.yaml`` lists this library's own results, see :class:`Measured`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mdistiller.registry import InputError, check_choice, suggestion

FOLDER = Path(__file__).parent
PAPERS = ("vrm", "mdr", "dist_plus", "dcd")
DOUBTS = (
    "confirmed", "likely", "split", "name", "inconsistent", "suspicious", "rounding", "wrong_in_paper_or_ocr",
)  # fmt: skip
TEXTS = {"id", "paper", "number", "where", "caption", "dataset", "metric", "conditions"}
COLUMN_KEYS = {
    "teacher", "student", "teacher_acc", "student_acc", "metric", "direction", "setting", "measure", "aggregate",
    "field", "strategy", "transfer_to", "detector", "teacher_kind", "teacher_note", "note",
}  # fmt: skip
ROW_KEYS = {
    "method", "printed_as", "venue", "family", "config", "student", "detector_kind", "role", "values", "std",
    "uncertain", "doubts", "differs", "ours", "retrained_teacher",
}  # fmt: skip
MEASURED_KEYS = {"dataset", "method", "teacher", "student", "top1", "config", "device", "commit"}


@dataclass(frozen=True)
class PaperTable:
    """A table as its paper prints it.

    Args:
        id: ``"vrm/tab1"``.
        facts: the keys of the file besides ``id``, ``columns`` and ``rows``.
        columns: one dictionary for each column.
        rows: one dictionary for each row.
    """

    id: str
    facts: dict[str, Any]
    columns: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def value(self, method: str, column: int) -> Any:
        """A method's value in a column; ``None`` where there is none or only one that is known to be wrong.

        Raises:
            InputError: the table has no such method.
        """
        row = next((row for row in self.rows if row["method"] == method), None)
        if row is None:
            raise InputError(f"{self.id}: no method {method!r}; {suggestion(method, [r['method'] for r in self.rows])}")
        wrong = {d["col"] for d in row.get("doubts", []) if d["status"] == "wrong_in_paper_or_ocr"}
        return None if column in wrong else row["values"][column]


@dataclass(frozen=True)
class Measured:
    """A result of this library.

    Args:
        dataset: as the papers' tables call it, ``"CIFAR-100"`` or ``"ImageNet"``.
        method: as the papers' tables call it.
        teacher: the network's name.
        student: the network's name.
        top1: accuracy after the last epoch in percent, one for each seed.
        config: the file in ``configs/``.
        device: where it was run.
        commit: of this library.
    """

    dataset: str
    method: str
    teacher: str
    student: str
    top1: list[float]
    config: str
    device: str
    commit: str

    @property
    def text(self) -> str:
        """Mean and, for several seeds, standard deviation."""
        spread = f"±{statistics.stdev(self.top1):.2f}" if len(self.top1) > 1 else ""
        return f"{statistics.fmean(self.top1):.2f}{spread}"


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """All tables by id.

    Raises:
        InputError: a file is not as the module's docstring says; names the table and what is wrong.
    """
    return {table.id: table for paper in PAPERS for table in read_tables(FOLDER / f"{paper}.yaml")}


def read_tables(path: Path) -> list[PaperTable]:
    """The tables of one file, checked."""
    tables = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        name = entry.get("id", "a table without id")
        where = f"{path.name}, {name}"
        _check_keys(where, entry, TEXTS | {"direction", "columns", "rows"}, {"derived_rows", "notes"})
        if not name.startswith(f"{path.stem}/") or name in {table.id for table in tables}:
            raise InputError(f"{where}: ids begin with {path.stem}/ and each comes once")
        if bad := [key for key in sorted(TEXTS) if not isinstance(entry[key], str)]:
            raise InputError(f"{where}: {', '.join(bad)} must be text")
        for number, column in enumerate(entry["columns"]):
            _check_keys(f"{where}, column {number}", column, set(), COLUMN_KEYS)
        for row in [*entry["rows"], *entry.get("derived_rows", [])]:
            _check_row(f"{where}, row {row.get('method')}", row, len(entry["columns"]))
        facts = {key: value for key, value in entry.items() if key not in ("id", "columns", "rows")}
        tables.append(PaperTable(name, facts, entry["columns"], entry["rows"]))
    return tables


def _check_row(where: str, row: dict[str, Any], columns: int) -> None:
    _check_keys(where, row, {"method", "values"}, ROW_KEYS)
    for key in ("values", "std"):
        if key in row and len(row[key]) != columns:
            raise InputError(f"{where}: {key} has {len(row[key])} entries, the table {columns} columns")
    for doubt in row.get("doubts", []):
        _check_keys(where, doubt, {"col", "printed", "status", "note"}, set())
        check_choice(f"{where}, status of a doubt", doubt["status"], DOUBTS)
        if doubt["col"] not in (*range(columns), "row"):
            raise InputError(f"{where}: a doubt about column {doubt['col']} of {columns}")


def measured(path: Path = FOLDER / "measured.yaml") -> list[Measured]:
    """This library's results, checked.

    Raises:
        InputError: an entry lacks a key, has one too many, or has no accuracies.
    """
    found = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        _check_keys(path.name, entry, MEASURED_KEYS, set())
        if not entry["top1"] or not all(0 <= value <= 100 for value in entry["top1"]):
            raise InputError(f"{path.name}: top1 must be a list of percentages, got {entry['top1']}")
        found.append(Measured(**entry))
    return found


def _check_keys(where: str, entry: dict[str, Any], needed: Iterable[str], allowed: Iterable[str]) -> None:
    lacking, unknown = set(needed) - set(entry), set(entry) - set(needed) - set(allowed)
    if lacking or unknown:
        raise InputError(f"{where}: lacks {sorted(lacking)}, has unknown {sorted(unknown)}")
