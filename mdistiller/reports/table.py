"""From results to a table: mean, standard deviation and number of seeds for each method and pair."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from typing import Any

from mdistiller.engine.task import Classification, Measure

from .plan import Plan

Results = dict[tuple[str, str, int], dict[str, Any]]
SECONDS = "training [s]"
# By number of seeds N: two equal methods pass a claim's test in 1 of this many plans (normal values of equal spread).
PASSES_BY_CHANCE = {2: 6, 3: 9, 4: 14, 5: 19}
COLUMNS = ("method", "pair", "last-epoch {}", "std", "n", SECONDS, "images seen")  # {}: the headline


@dataclass(frozen=True)
class Summary:
    """A row: a method on a pair over the seeds.

    Args:
        method: row name in the plan.
        pair: teacher-student pair.
        values: the headline after the last epoch, by seed.
        seconds: training time of each run with data and with the method's stage before training, also if another run
            computed the stage; without evaluation. Empty for a teacher.
        images_seen: number of images that the student processed in each run, with every view and every copy; 0 for a
            teacher.
        headline: name, unit and direction of ``values``.
    """

    method: str
    pair: str
    values: list[float]
    seconds: list[float]
    images_seen: int
    headline: Measure = Classification().headline

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def cells(self) -> tuple[str, ...]:
        seconds = f"{statistics.fmean(self.seconds):.1f}" if self.seconds else ""
        return (
            self.method, self.pair, self.headline.text(self.mean), self.headline.text(self.std),
            str(len(self.values)), seconds, f"{self.images_seen:,}" if self.images_seen else "",
        )  # fmt: skip


def summarize(plan: Plan, results: Results) -> list[Summary]:
    """A row for each teacher of each pair, then a row for each method and pair, in the plan's order."""
    rows = [row for pair in plan.pairs for row in _teachers(plan, results, pair)]
    for method in plan.methods:
        for pair in plan.pairs:
            runs = [results[method, pair, seed] for seed in plan.seeds]
            values = [run["last"][plan.headline.name] for run in runs]
            seconds = [run["seconds"]["train"] + run.get("preparation", {}).get("seconds", 0.0) for run in runs]
            rows.append(Summary(method, pair, values, seconds, runs[0]["images_seen"], plan.headline))
    return rows


def _teachers(plan: Plan, results: Results, pair: str) -> list[Summary]:
    """The teachers of a pair with their scores before the first step; each checkpoint file counts once."""
    scores: dict[str, dict[Any, float]] = {}
    for method in plan.methods:
        for seed in plan.seeds:
            teacher = results[method, pair, seed].get("teacher", {})
            if plan.headline.name in teacher:
                scores.setdefault(teacher["name"], {})[teacher.get("sha256")] = teacher[plan.headline.name]
    return [
        Summary(f"teacher ({name})", pair, list(values.values()), [], 0, plan.headline)
        for name, values in scores.items()
    ]


def columns(rows: list[Summary]) -> tuple[str, ...]:
    """The table's head."""
    return tuple(column.format(rows[0].headline.title) for column in COLUMNS)


def render(rows: list[Summary], seconds: bool = True) -> str:
    """The table in Markdown, with aligned columns for readers of the plain text.

    Args:
        rows: of :func:`summarize`.
        seconds: show training times, which can be compared only if all runs had the same machine and code.
    """
    lines = [columns(rows), *(row.cells() for row in rows)]
    if not seconds:
        place = COLUMNS.index(SECONDS)
        lines = [line[:place] + line[place + 1 :] for line in lines]
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
    writer.writerow(columns(rows))
    writer.writerows(row.cells() for row in rows)
    return text.getvalue()


def check_claims(plan: Plan, rows: list[Summary]) -> list[tuple[bool, str]]:
    """For each of the plan's claims and each pair: whether the claim holds, and a sentence that says so.

    A method is better than another if its mean is better by more than the larger of both standard deviations. A claim
    with a limit holds if the mean of the differences, seed by seed, is at most the limit. With few seeds, the sentence
    of a claim that holds says how often two equal methods pass the test by chance.
    """
    summaries = {(row.method, row.pair): row for row in rows}
    verdicts = []
    for one, other, *limit in plan.claims:
        for pair in plan.pairs:
            a, b = summaries[one, pair], summaries[other, pair]
            if limit:
                verdicts.append(_alike(a, b, *limit))
            elif min(len(a.values), len(b.values)) < 2:
                verdicts.append((False, f"whether {one} beats {other} on {pair} cannot be told from one seed"))
            else:
                verdicts.append(_better(a, b))
    return verdicts


def _better(a: Summary, b: Summary) -> tuple[bool, str]:
    headline, gain, needed = a.headline, a.headline.gain(a.mean, b.mean), max(a.std, b.std)
    holds = gain > needed
    sentence = f"{a.method} {'beats' if holds else 'does NOT beat'} {b.method} on {a.pair}: {headline.difference(gain)}"
    seeds = min(len(a.values), len(b.values))
    weak = holds and seeds in PASSES_BY_CHANCE
    chance = f" (weak: with {seeds} seeds, equal methods pass in 1 of {PASSES_BY_CHANCE[seeds]} plans)" if weak else ""
    return holds, f"{sentence}, larger std {headline.text(needed)}{chance}"


def _alike(a: Summary, b: Summary, limit: float) -> tuple[bool, str]:
    headline, differences = a.headline, [x - y for x, y in zip(a.values, b.values, strict=True)]
    mean = statistics.fmean(differences)
    holds = abs(mean) <= limit
    spread = ""
    if len(differences) > 1:
        spread = f", std {headline.text(statistics.stdev(differences))} over {len(differences)} seeds"
    sentence = (
        f"{a.method} is {'' if holds else 'NOT '}within {headline.difference(limit, 'g')} of {b.method} on {a.pair}"
    )
    return holds, f"{sentence}: {headline.difference(mean)} seed by seed{spread}"
