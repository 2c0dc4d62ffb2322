"""The files that a plan leaves: table, curves, verdicts; and several plans as one page to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdistiller.engine.folder.checkpoint import write_atomically
from mdistiller.registry import InputError

from .plan import Plan
from .plots import accuracies, learning_curves
from .table import Results, check_claims, render, summarize, to_csv


@dataclass(frozen=True)
class Report:
    """The result of a plan.

    Args:
        title: the plan's.
        body: table, verdicts and how to read them, in Markdown.
        provenance: where, when and with what the runs were made.
        files: where the plan's files and runs are, and what is missing.
        claims_hold: whether every claim of the plan holds.
    """

    title: str
    body: str
    provenance: str
    files: str
    claims_hold: bool

    @property
    def text(self) -> str:
        """The printed text."""
        return f"{self.body}\n\n{self.provenance}\n\n{self.files}"


def write_report(plan: Plan, results: Results) -> Report:
    """Write ``table.md``, ``table.csv`` and, with matplotlib, two pictures into the plan's output folder.

    The table shows training times only where all runs had the same machine, threads, torch and code.
    """
    rows = summarize(plan, results)
    verdicts = check_claims(plan, rows)
    write_atomically(plan.output / "table.csv", to_csv(rows))
    images = next(iter(results.values()))["last"]["images"]
    origin = _origin(plan)
    same = all(len(values) == 1 for fact, values in origin.items() if fact != "day")
    parts = [render(rows, seconds=same), *(sentence for _, sentence in verdicts)]
    if plan.how_to_read:
        parts.append(plan.how_to_read.format(images=images, image_points=100 / images).rstrip())
    names, missing = "table.md, table.csv", ""
    try:
        learning_curves(plan, plan.output / "curves.png")
        accuracies(rows, plan.title, plan.output / "accuracies.svg")
        names += ", curves.png, accuracies.svg"
    except InputError as error:
        missing = f"No curves.png: {error}\n\n"
    files = f"{missing}Tables, curves and every run: {plan.output}/ ({names})"
    holds = all(verdict for verdict, _ in verdicts)
    provenance = "Measured " + ", ".join(" / ".join(sorted(values)) for values in origin.values()) + "."
    report = Report(plan.title, "\n\n".join(parts), provenance, files, holds)
    write_atomically(plan.output / "table.md", f"# {plan.title}\n\n{report.text}\n")
    return report


def _origin(plan: Plan) -> dict[str, set[str]]:
    """When, on what machine and with what software the plan's runs were made, as their ``environment.json`` say."""
    found: dict[str, set[str]] = {}
    for cell in plan.cells():
        facts = json.loads((cell.folder / "environment.json").read_text())
        for key, value in _facts(facts).items():
            found.setdefault(key, set()).add(value)
    return found


def _facts(environment: dict) -> dict[str, str]:
    threads, device, git = environment["threads"], environment["device"], environment["git"]
    return {
        "day": f"on {environment['started'][:10]}",
        "device": f"on {environment.get('processor', environment['machine']) if device == 'cpu' else device}",
        "threads": f"{threads} thread{'' if threads == 1 else 's'} a run",
        "torch": f"torch {environment['torch']}",
        "code": f"mdistiller {environment['mdistiller']}" + (f" at {git[:7]}{git[40:]}" if git else ""),
    }


def write_page(path: str | Path, reports: Sequence[Report], command: str) -> None:
    """The reports of several plans as one Markdown page, with the command that makes it."""
    parts = ["# Measured results", f"Made by `{command}`; headlines are of the last epoch."]
    for report in reports:
        parts += [f"## {report.title}", report.body, report.provenance]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), "\n\n".join(parts) + "\n")
