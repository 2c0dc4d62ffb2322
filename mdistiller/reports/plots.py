"""Pictures of a plan's runs. Needs matplotlib: ``pip install mdistiller[plots]``."""

from __future__ import annotations

import csv
from pathlib import Path

from mdistiller.engine.utils import pyplot

from .plan import Plan
from .table import Summary

LINES = ("-", "--", ":")


def learning_curves(plan: Plan, path: Path) -> None:
    """The headline on the test images over the epochs: one panel a pair, one colour a method; the line is the mean over
    the seeds, the band spans them. Written to ``path`` as PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot("the learning curves")
    size = 3.5 + 5.5 * len(plan.pairs), max(4.5, 1 + 0.22 * len(plan.methods))  # as high as the list of methods
    figure, panels = plt.subplots(1, len(plan.pairs), figsize=size, squeeze=False, layout="constrained")
    colors = plt.get_cmap("tab10").colors
    cells = plan.cells()
    for panel, pair in zip(panels[0], plan.pairs, strict=True):
        for number, method in enumerate(plan.methods):
            color, line = colors[number % len(colors)], LINES[number // len(colors) % len(LINES)]
            runs = [cell.folder / "metrics.csv" for cell in cells if (cell.method, cell.pair) == (method, pair)]
            curves = [_curve(path, plan.headline.column) for path in runs]
            epochs = [epoch for epoch, _ in curves[0]]
            values = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
            panel.plot(epochs, [sum(v) / len(v) for v in values], line, color=color, label=method)
            panel.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, lw=0)
        panel.set(title=pair, xlabel="epoch", ylabel=f"{plan.headline.title}, mean and span of the seeds")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(plan.title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def accuracies(rows: list[Summary], title: str, path: Path) -> None:
    """The table as a picture: a dot for each seed, a bar at their mean, a line at the pair's teacher. Written as SVG.

    Args:
        rows: of ``summarize``.
        title: stands above.
        path: where to write.

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
