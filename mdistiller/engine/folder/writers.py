"""Log writers: CSV, mdistiller's worklog, TensorBoard, Weights & Biases.

A writer gets each epoch's line as a flat dictionary. After a resume it starts with the lines up to the checkpoint and
drops later lines of its file. So no line is missing or written twice.
"""

from __future__ import annotations

import csv
import io
import itertools
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mdistiller.messages import say, warn

from ..task import Measure
from .checkpoint import DiskFullError, append, saving, write_atomically

Row = dict[str, float]


class Writer:
    """Base: writes nothing."""

    def start(self, rows: list[Row], step: int) -> None: ...
    def write_step(self, step: int, loss: Tensor, rate: float) -> None: ...
    def write_epoch(self, row: Row) -> None: ...
    def finish(self, results: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class CsvWriter(Writer):
    """``metrics.csv``: a line for each epoch; a cell is empty if the epoch has no such value."""

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
            self._rewrite()  # the first evaluation adds columns
        else:
            append(self.path, csv_text(self.columns, [row], header=False))

    def _rewrite(self) -> None:
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        write_atomically(self.path, csv_text(self.columns, self.rows, header=bool(self.columns)))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = True) -> str:
    """Lines of a CSV file; a cell is empty if the row has no such value."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class WorklogWriter(Writer):
    """``worklog.txt`` in mdistiller's form, except that small learning rates keep their digits.

    Args:
        path: the file.
        measures: of the task, the headline first; all values are written with the headline's number of digits.
    """

    def __init__(self, path: Path, measures: Sequence[Measure]) -> None:
        self.path, self.headline = path, measures[0]
        scores = [f"{split}_{measure.column}" for split in ("test", "val") for measure in measures]
        self.keys = dict.fromkeys([f"train_{self.headline.column}", "train_loss", *scores])

    def start(self, rows: list[Row], step: int) -> None:
        write_atomically(self.path, "".join(map(self.render, rows)))

    def write_epoch(self, row: Row) -> None:
        append(self.path, self.render(row))

    def finish(self, results: dict[str, Any]) -> None:
        if "best" in results:
            best = self.headline.text(results["best"][self.headline.name])
            append(self.path, f"best_{self.headline.column}\t{best}")

    def render(self, row: Row) -> str:
        line = "-" * 25
        named = [f"{key}: {self.headline.text(row[key])}" for key in self.keys if key in row]
        return "\n".join([line, f"epoch: {row['epoch']}", f"lr: {row['lr']:.6g}", *named, line]) + "\n"


class Events:
    """A TensorBoard file, written without a thread.

    tensorboardX's own writer writes in a thread. After an error in the thread, each further call waits for ever.

    Args:
        folder: of the file; created if it is missing.
        purge_step: TensorBoard ignores values of the folder's earlier files from this step on.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        import tensorboardX  # noqa: F401  before its parts, which may remain after an uninstallation
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self.event, self.scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"events.out.tfevents.{second}.{socket.gethostname()}" for second in itertools.count(int(time.time())))
        self.file = RecordWriter(str(next(folder / name for name in names if not (folder / name).exists())))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(step=step, summary=self.scalar(name, value))

    def _write(self, **values: Any) -> None:
        self.file.write(self.event(wall_time=time.time(), **values).SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorboardWriter(Writer):
    """``train.events``: each epoch's values. Its subfolder ``steps``: loss and learning rate every ``frequency`` steps.

    There are two folders, since a resume cuts the one by epoch and the other by step. A full disk stops the run; after
    any other failure the run continues without these files.
    """

    def __init__(self, folder: Path, frequency: int) -> None:
        self.folder, self.frequency = folder, frequency
        self.events: Events | None = None
        self.steps: Events | None = None

    def start(self, rows: list[Row], step: int) -> None:
        try:
            with self._dispensable():
                self.events = Events(self.folder, len(rows) + 1 if rows else None)
                if self.frequency:
                    self.steps = Events(self.folder / "steps", step + 1 if step else None)
        except ImportError:
            say("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")

    def write_step(self, step: int, loss: Tensor, rate: float) -> None:
        if self.steps is not None and step % self.frequency == 0:
            with self._dispensable():
                self.steps.add_scalar("step/train_loss", loss.item(), step)
                self.steps.add_scalar("step/lr", rate, step)

    def write_epoch(self, row: Row) -> None:
        if self.events is None:
            return
        with self._dispensable():
            for key, value in row.items():
                if key != "epoch":
                    self.events.add_scalar(key, value, row["epoch"])
            self.events.flush()

    def close(self) -> None:
        with self._dispensable(), ExitStack() as stack:
            for events in filter(None, (self.events, self.steps)):
                stack.callback(events.close)

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        try:
            with saving(self.folder):
                yield
        except (DiskFullError, ImportError):
            raise
        except Exception as error:
            warn(f"no more TensorBoard files; the run continues: {error}")
            self.events = self.steps = None


class WandbWriter(Writer):
    """Weights & Biases, imported only if ``LOG.WANDB`` is on. After a failure the run continues without it."""

    def __init__(self, cfg: Any, folder: Path, headline: Measure) -> None:
        self.cfg, self.folder, self.headline = cfg, folder, headline
        self.run: Any = None

    def start(self, rows: list[Row], step: int) -> None:
        experiment = self.cfg.EXPERIMENT
        with self._dispensable():
            import wandb

            self.run = wandb.init(
                project=experiment.PROJECT,
                name=experiment.NAME or experiment.TAG,
                tags=[tag for tag in experiment.TAG.split(",") if tag],
                dir=str(self.folder),
                config=_plain(self.cfg),
            )

    def write_epoch(self, row: Row) -> None:
        if self.run is not None:
            with self._dispensable():
                self.run.log({"current lr": row["lr"], **row})

    def finish(self, results: dict[str, Any]) -> None:
        if self.run is not None and "best" in results:
            with self._dispensable():
                for which in ("best", "last"):
                    self.run.summary[f"{which}_{self.headline.column}"] = results[which][self.headline.name]

    def close(self) -> None:
        if self.run is not None:
            with self._dispensable():
                self.run.finish()

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any failure: no network, no account, no package
            say(f"LOG.WANDB is on, but wandb failed; the run continues without it: {error}")
            self.run = None


def _plain(node: Any) -> Any:
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node
