"""The files of a finished plan: table, curves, verdicts; and a page with the results of several plans."""

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
        title: of the plan.
        body: table, verdicts and the plan's explanation, in Markdown.
        provenance: date, machine and software of the runs.
        files: the paths of the plan's files and runs, and the reason for a missing file.
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

    The table shows training times only if all runs had the same machine, threads, torch and code.
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
    """Date, machine and software of the plan's runs, from their ``environment.json``."""
    origin: dict[str, set[str]] = {}
    for cell in plan.cells():
        environment = json.loads((cell.folder / "environment.json").read_text())
        for key, value in _facts(environment).items():
            origin.setdefault(key, set()).add(value)
    return origin


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
    """Write the reports of several plans as one Markdown page, with the command that makes the page."""
    parts = ["# Measured results", f"Made by `{command}`; headlines are of the last epoch."]
    for report in reports:
        parts += [f"## {report.title}", report.body, report.provenance]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), "\n\n".join(parts) + "\n")
