"""Where the numbers of a run go: CSV, mdistiller's worklog, TensorBoard, Weights & Biases.

A writer gets each epoch's line as a flat dictionary. After a resume it is started with the lines up to the
checkpoint, and whatever the file held beyond them is dropped: no line twice, none missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mdistiller.messages import say

from ..task import Measure
from .checkpoint import write_atomically

Row = dict[str, float]


class Writer:
    """Base: takes everything and writes nothing."""

    def start(self, rows: list[Row], step: int) -> None: ...
    def write_step(self, step: int, loss: Tensor, rate: float) -> None: ...
    def write_epoch(self, row: Row) -> None: ...
    def finish(self, results: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class CsvWriter(Writer):
    """``metrics.csv``: a line for each epoch; a cell is empty where an epoch has no such value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.columns: list[str] = []

    def start(self, rows: list[Row], step: int) -> None:
        self.rows = list(rows)
        self._rewrite()

    def write_epoch(self, row: Row) -> None:
        self.rows.append(row)
        if set(row) - set(self.columns):
            self._rewrite()  # a column more, at the first evaluation
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        if self.columns:
            writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())


class WorklogWriter(Writer):
    """``worklog.txt`` in mdistiller's form, except that small learning rates keep their digits.

    Args:
        path: the file.
        measures: of the task, the headline first; all values have as many digits as the headline.
    """

    def __init__(self, path: Path, measures: Sequence[Measure]) -> None:
        self.path, self.headline = path, measures[0]
        scores = [f"{split}_{measure.column}" for split in ("test", "val") for measure in measures]
        self.keys = dict.fromkeys([f"train_{self.headline.column}", "train_loss", *scores])

    def start(self, rows: list[Row], step: int) -> None:
        write_atomically(self.path, "".join(map(self.render, rows)))

    def write_epoch(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(self.render(row))

    def finish(self, results: dict[str, Any]) -> None:
        if "best" in results:
            best = self.headline.text(results["best"][self.headline.name])
            with self.path.open("a") as file:
                file.write(f"best_{self.headline.column}\t{best}")

    def render(self, row: Row) -> str:
        line = "-" * 25
        named = [f"{key}: {self.headline.text(row[key])}" for key in self.keys if key in row]
        return "\n".join([line, f"epoch: {row['epoch']}", f"lr: {row['lr']:.6g}", *named, line]) + "\n"


class TensorboardWriter(Writer):
    """``train.events``: each epoch's values by epoch; in ``steps`` below it loss and rate every ``frequency`` steps.

    Two folders, since a resume discards what lies behind its point, and that is counted in epochs for the one and in
    steps for the other.
    """

    def __init__(self, folder: Path, frequency: int) -> None:
        self.folder, self.frequency = folder, frequency
        self.events: Any = None
        self.steps: Any = None

    def start(self, rows: list[Row], step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            say("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")
            return
        self.events = SummaryWriter(str(self.folder), purge_step=len(rows) + 1 if rows else None)
        if self.frequency:
            self.steps = SummaryWriter(str(self.folder / "steps"), purge_step=step + 1 if step else None)

    def write_step(self, step: int, loss: Tensor, rate: float) -> None:
        if self.steps is not None and step % self.frequency == 0:
            self.steps.add_scalar("step/train_loss", loss.item(), step)
            self.steps.add_scalar("step/lr", rate, step)

    def write_epoch(self, row: Row) -> None:
        if self.events is None:
            return
        for key, value in row.items():
            if key != "epoch":
                self.events.add_scalar(key, value, row["epoch"])
        self.events.flush()

    def close(self) -> None:
        for events in (self.events, self.steps):
            if events is not None:
                events.close()


class WandbWriter(Writer):
    """Weights & Biases, imported only when asked for; a run goes on without it where it fails."""

    def __init__(self, cfg: Any, folder: Path, headline: Measure) -> None:
        self.cfg, self.folder, self.headline = cfg, folder, headline
        self.run: Any = None

    def start(self, rows: list[Row], step: int) -> None:
        experiment = self.cfg.EXPERIMENT
        try:
            import wandb

            self.run = wandb.init(
                project=experiment.PROJECT,
                name=experiment.NAME or experiment.TAG,
                tags=[tag for tag in experiment.TAG.split(",") if tag],
                dir=str(self.folder),
                config=_plain(self.cfg),
            )
        except Exception as error:  # any of its failures: no network, no account, no package
            say(f"LOG.WANDB is on, but wandb failed; going on without it: {error}")

    def write_epoch(self, row: Row) -> None:
        if self.run is not None:
            self.run.log({"current lr": row["lr"], **row})

    def finish(self, results: dict[str, Any]) -> None:
        if self.run is not None and "best" in results:
            for which in ("best", "last"):
                self.run.summary[f"{which}_{self.headline.column}"] = results[which][self.headline.name]

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _plain(node: Any) -> Any:
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node
