"""Pictures of a plan's runs. Needs matplotlib: ``pip install -e ".[plots]"``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.engine.utils import pyplot

from .plan import Plan
from .table import Summary

LINES = ("-", "--", "-.", ":")  # beside the colour, for print in grey
COLORS = ("#1f4e9c", "#c44e00", "#1a7f4b", "#a3195b", "#4d4d4d", "#6a3fb5", "#8a6d00")  # dark, since they colour text
LABEL = 0.22  # height of a line of text, in inches


def learning_curves(plan: Plan, path: Path) -> None:
    """Draw the headline on the test images over the epochs, as PNG: a panel for each pair, a line for each method.

    A line is the mean over the seeds, and its band is their range. The method's name and its mean after the last epoch
    are written at the line's end. The range of the vertical axis is that of the last third of the epochs.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot("the learning curves")
    height = max(4.2, 1.2 + LABEL * len(plan.methods))
    figure, panels = plt.subplots(
        1, len(plan.pairs), figsize=(7.5 * len(plan.pairs), height), squeeze=False, layout="constrained"
    )
    cells, headline = plan.cells(), plan.headline
    for panel, pair in zip(panels[0], plan.pairs, strict=True):
        ends, settled, epochs = [], [], [0]
        for number, method in enumerate(plan.methods):
            color, line = COLORS[number % len(COLORS)], LINES[number % len(LINES)]
            runs = [cell.folder / "metrics.csv" for cell in cells if (cell.method, cell.pair) == (method, pair)]
            curves = [_curve(path, headline.column) for path in runs]
            epochs = [epoch for epoch, _ in curves[0]]
            values = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
            means = [sum(v) / len(v) for v in values]
            panel.plot(epochs, means, line, color=color, linewidth=1.8)
            panel.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=color, alpha=0.12, lw=0)
            settled += [
                value for epoch, v in zip(epochs, values, strict=True) if epoch > epochs[-1] * 2 / 3 for value in v
            ]
            ends.append((means[-1], f"{method}  {headline.text(means[-1])}", color))
        margin = 0.06 * (max(settled) - min(settled)) or 1.0
        panel.set_ylim(min(settled) - margin, max(settled) + margin)
        panel.set_xlim(0, epochs[-1])
        panel.set_title(pair, fontsize=11, loc="left")
        panel.set(xlabel="epoch", ylabel=headline.title)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        _name_ends(panel, epochs[-1], ends, gap=LABEL / (height - 1.2))
    several = f"mean and range of {len(plan.seeds)} seeds"
    _explain(panels[0, 0], several if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}")
    figure.suptitle(plan.title, fontsize=14, x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name_ends(panel: Any, x: float, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Write ``(value, text, colour)`` beside the lines' ends. Texts that overlap are moved apart."""
    low, high = panel.get_ylim()
    ends = sorted(ends)
    places = apart([(value - low) / (high - low) for value, *_ in ends], gap)
    for (value, text, color), place in zip(ends, places, strict=True):
        panel.annotate(
            text, (x, value), (1.05, place), textcoords="axes fraction", color=color, va="center", fontsize=9.5,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkB": 0},
        )  # fmt: skip


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in [0, 1], moved apart by ``gap``; above 1 only if they do not fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max([place, *(last + gap for last in moved[-1:])]))
    top = max(1.0, gap * (len(moved) - 1))
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved


def _explain(panel: Any, text: str) -> None:
    """Add the legend of line and band."""
    line = panel.plot([], [], color="0.3", linewidth=1.8)[0]
    band = panel.fill_between([], [], [], color="0.3", alpha=0.2, lw=0)
    panel.legend([(band, line)], [text], loc="lower right", fontsize=9)


def accuracies(rows: list[Summary], title: str, path: Path) -> None:
    """Draw the table as SVG: a dot for each seed, a bar at their mean, a line at the accuracy of the pair's teacher.

    Args:
        rows: of ``summarize``.
        title: written above the panels.
        path: of the SVG file.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot("the pictures")
    pairs, methods = (list(dict.fromkeys(names)) for names in zip(*[(r.pair, r.method) for r in rows], strict=True))
    size = 2.5 + 5 * len(pairs), 1.3 + 0.32 * len(methods)
    figure, panels = plt.subplots(1, len(pairs), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for panel, pair in zip(panels[0], pairs, strict=True):
        for row in (row for row in rows if row.pair == pair):
            place, is_teacher = methods.index(row.method), not row.seconds
            if is_teacher:
                panel.axvline(row.mean, color="tab:orange", linestyle="--")
            color = "tab:orange" if is_teacher else "tab:blue"
            panel.plot(row.values, [place] * len(row.values), "o", color=color, alpha=0.5)
            panel.plot([row.mean], [place], "|", color="black", markersize=14, markeredgewidth=2)
            mean = f" {row.headline.text(row.mean)}"
            panel.text(1, place, mean, transform=panel.get_yaxis_transform(), va="center", fontsize=9)
        panel.set(xlabel=rows[0].headline.title, yticks=range(len(methods)), yticklabels=methods)
        panel.set_ylim(len(methods) - 0.5, -0.5)
        panel.grid(axis="x", alpha=0.3)
        if len(pairs) > 1:
            panel.set_title(pair, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _curve(path: Path, column: str) -> list[tuple[int, float]]:
    """(epoch, value) of the evaluated epochs."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = f"test_{column}" if rows and rows[-1].get(f"test_{column}") else f"val_{column}"
    return [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)]
