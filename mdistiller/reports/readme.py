"""README's table: the papers' results for their methods, and this library's results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdistiller.engine.folder.checkpoint import write_atomically
from mdistiller.registry import InputError

from .tables import Measured, PaperTable, measured, paper_tables

BEGIN, END = "<!-- made by: python tools/list.py --page README.md -->", "<!-- end -->"
PAIRS = ("dcd/tab7", "dcd/tab8", "vrm/tab2")  # tables whose columns are the pairs
SOURCES = {
    "KD": PAIRS,
    "VRM": ("vrm/tab12", "vrm/tab13", "vrm/tab2"),
    "MDR": ("mdr/tab1", "mdr/tab2"),
    "DIST": ("dist_plus/tab6", "vrm/tab13", "dist_plus/tab3"),
    "DIST+": ("dist_plus/tab6", "dist_plus/tab3"),
    "DCD": ("dcd/tab7", "dcd/tab8"),
    "DCD+KD": ("dcd/tab7", "dcd/tab8"),
}


def papers_table(results: list[Measured]) -> str:
    """The table and its footnote, in Markdown. Cells hold the paper's number and this library's number.

    Args:
        results: of :func:`~mdistiller.reports.tables.measured`.
    """
    lines = [("teacher→student", "teacher", "alone", *SOURCES), ("---",) * (3 + len(SOURCES))]
    ours = {(r.dataset, r.method, r.teacher, r.student): r.text for r in results}
    others: dict[str, dict[str, float]] = {}
    dataset = None
    for table, pair in _pairs():
        if table.facts["dataset"] != dataset:
            dataset = table.facts["dataset"]
            lines.append((f"**{dataset}**", *[""] * (2 + len(SOURCES))))
        cells = [f"{pair['teacher']}→{pair['student']}", f"{pair['teacher_acc']:.2f}", f"{pair['student_acc']:.2f}"]
        for method in SOURCES:
            value, other = _reported(method, dataset, pair)
            others.setdefault(method, {}).update(other)
            reported = "-" if value is None else f"{value:.2f}{'†' if other else ''}"
            cells.append(f"{reported}/{ours.get((dataset, method, pair['teacher'], pair['student']), '-')}")
        lines.append(tuple(cells))
    differing = [
        f"{method} {', '.join(f'{name} {accuracy:.2f}' for name, accuracy in other.items())}"
        for method, other in others.items()
        if other
    ]
    note = f"† In the papers these networks are others, by their accuracies: {'; '.join(differing)}."
    return "\n".join(f"|{'|'.join(cells)}|" for cells in lines) + f"\n\n{note}"


def _pairs() -> Iterator[tuple[PaperTable, dict[str, Any]]]:
    """Each pair's table and column, top-1 only."""
    for table in map(paper_tables().get, PAIRS):
        yield from ((table, column) for column in table.columns if "top5" not in column.get("metric", ""))


def _reported(method: str, dataset: str, pair: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    """The first number in a method's sources for a pair, and the paper's accuracies of its teacher and student.

    An accuracy is returned only if it differs from that in ``pair`` by more than rounding.
    """
    for table in map(paper_tables().get, SOURCES[method]):
        if table.facts["dataset"] != dataset or method not in [row["method"] for row in table.rows]:
            continue
        for number, column in enumerate(table.columns):
            same = all(column.get(key) == pair[key] for key in ("teacher", "student"))
            if same and "top5" not in column.get("metric", "") and table.value(method, number) is not None:
                return table.value(method, number), {
                    column[key]: column[f"{key}_acc"]
                    for key in ("teacher", "student")
                    if abs(column[f"{key}_acc"] - pair[f"{key}_acc"]) > 0.05
                }
    return None, {}


def write_readme_table(path: Path) -> None:
    """Write the table between README's two marks.

    Raises:
        InputError: the file lacks a mark.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{path} needs the lines {BEGIN} and {END}, between which the table goes")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    write_atomically(path, f"{before}{BEGIN}\n\n{papers_table(measured())}\n\n{END}{after}")
