"""The files that a plan leaves: table, curves, verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from mdistiller.engine.checkpoint import write_atomically
from mdistiller.registry import InputError

from .plan import Plan
from .plots import learning_curves
from .table import Results, check_claims, render, summarize, to_csv


@dataclass(frozen=True)
class Report:
    """The text as printed, and whether every claim of the plan holds."""

    text: str
    claims_hold: bool


def write_report(plan: Plan, results: Results) -> Report:
    """Write ``table.md``, ``table.csv`` and, where matplotlib is installed, ``curves.png`` into the plan's output
    folder."""
    rows = summarize(plan, results)
    verdicts = check_claims(plan, rows)
    write_atomically(plan.output / "table.csv", to_csv(rows))
    images = next(iter(results.values()))["last"]["images"]
    parts = [render(rows), *(sentence for _, sentence in verdicts)]
    if plan.how_to_read:
        parts.append(plan.how_to_read.format(images=images, image_points=100 / images).rstrip())
    files = "table.md, table.csv"
    try:
        learning_curves(plan, plan.output / "curves.png")
        files += ", curves.png"
    except InputError as error:
        parts.append(f"No curves.png: {error}")
    parts.append(f"Tables, curves and every run: {plan.output}/ ({files})")
    text = "\n\n".join(parts)
    write_atomically(plan.output / "table.md", f"# {plan.title}\n\n{text}\n")
    return Report(text, all(holds for holds, _ in verdicts))
