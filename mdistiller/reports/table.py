"""From results to a table: mean, standard deviation and number of seeds for each method and pair."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from typing import Any

from .plan import Plan

Results = dict[tuple[str, str, int], dict[str, Any]]
COLUMNS = ("method", "pair", "last-epoch top-1 [%]", "std", "n", "training [s]", "images seen")


@dataclass(frozen=True)
class Summary:
    """A row: a method on a pair over the seeds.

    Args:
        method: row name in the plan.
        pair: teacher-student pair.
        top1: accuracy after the last epoch in percent, by seed.
        seconds: training time of each run: data and a method's stage before training included, the latter also where
            its result came from another run's file; evaluation not.
        images_seen: images that went through the student in each run, every view and every copy counted.
    """

    method: str
    pair: str
    top1: list[float]
    seconds: list[float]
    images_seen: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0

    def cells(self) -> tuple[str, ...]:
        seconds = statistics.fmean(self.seconds)
        return (
            self.method, self.pair, f"{self.mean:.2f}", f"{self.std:.2f}", str(len(self.top1)), f"{seconds:.1f}",
            f"{self.images_seen:,}",
        )  # fmt: skip


def summarize(plan: Plan, results: Results) -> list[Summary]:
    """One row for each method and pair, in the plan's order."""
    rows = []
    for method in plan.methods:
        for pair in plan.pairs:
            runs = [results[method, pair, seed] for seed in plan.seeds]
            top1 = [run["last"]["top1"] for run in runs]
            seconds = [run["seconds"]["train"] + run.get("preparation", {}).get("seconds", 0.0) for run in runs]
            rows.append(Summary(method, pair, top1, seconds, runs[0]["images_seen"]))
    return rows


def render(rows: list[Summary]) -> str:
    """The table in Markdown, columns aligned so that it reads well as plain text too."""
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:]))


def to_csv(rows: list[Summary]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(row.cells() for row in rows)
    return text.getvalue()


def check_claims(plan: Plan, rows: list[Summary]) -> list[tuple[bool, str]]:
    """For each of the plan's claims and each pair: does it hold, and the sentence that says so.

    A method is better than another if its mean lies above by more than the larger of both standard deviations. With a
    limit, two methods are alike if the mean of their differences, seed by seed, is at most that.
    """
    found = {(row.method, row.pair): row for row in rows}
    verdicts = []
    for one, other, *limit in plan.claims:
        for pair in plan.pairs:
            a, b = found[one, pair], found[other, pair]
            if limit:
                verdicts.append(_alike(a, b, *limit))
            elif min(len(a.top1), len(b.top1)) < 2:
                verdicts.append((False, f"whether {one} beats {other} on {pair} cannot be told from one seed"))
            else:
                verdicts.append(_better(a, b))
    return verdicts


def _better(a: Summary, b: Summary) -> tuple[bool, str]:
    gain, needed = a.mean - b.mean, max(a.std, b.std)
    holds = gain > needed
    sentence = f"{a.method} {'beats' if holds else 'does NOT beat'} {b.method} on {a.pair}: {gain:+.2f} points"
    return holds, f"{sentence}, larger std {needed:.2f}"


def _alike(a: Summary, b: Summary, limit: float) -> tuple[bool, str]:
    differences = [x - y for x, y in zip(a.top1, b.top1, strict=True)]
    mean = statistics.fmean(differences)
    holds = abs(mean) <= limit
    spread = f", std {statistics.stdev(differences):.2f} over {len(differences)} seeds" if len(differences) > 1 else ""
    sentence = f"{a.method} is {'' if holds else 'NOT '}within {limit:g} points of {b.method} on {a.pair}"
    return holds, f"{sentence}: {mean:+.2f} points seed by seed{spread}"
