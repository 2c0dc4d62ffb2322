"""Pictures of a plan's runs. Needs matplotlib: ``pip install mdistiller[plots]``."""

from __future__ import annotations

import csv
from pathlib import Path

from mdistiller.engine.utils import pyplot

from .plan import Plan


def learning_curves(plan: Plan, path: Path) -> None:
    """Accuracy on the test images over the steps: one panel a pair, one colour a method; the line is the mean over
    the seeds, the band spans them. Written to ``path`` as PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot("the learning curves")
    figure, panels = plt.subplots(
        1, len(plan.pairs), figsize=(1.5 + 5.5 * len(plan.pairs), 4.5), squeeze=False, layout="constrained"
    )
    cells = plan.cells()
    for panel, pair in zip(panels[0], plan.pairs, strict=True):
        for color, method in zip(plt.get_cmap("tab10").colors * 10, plan.methods, strict=False):
            curves = [_curve(c.folder / "metrics.csv") for c in cells if (c.method, c.pair) == (method, pair)]
            epochs = [epoch for epoch, _ in curves[0]]
            values = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
            panel.plot(epochs, [sum(v) / len(v) for v in values], color=color, label=method)
            panel.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, lw=0)
        panel.set(title=pair, xlabel="epoch", ylabel="accuracy [%], mean and span of the seeds")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.suptitle(plan.title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(path: Path) -> list[tuple[int, float]]:
    """(epoch, accuracy) of the evaluated epochs."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = "test_acc" if rows and rows[-1].get("test_acc") else "val_acc"
    return [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)]
