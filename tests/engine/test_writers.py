"""Where the numbers go, and that the clock tells waiting for data from training."""

import errno
import sys
import threading
import time
import types

import torch
from runs import make_trainer, tiny_config
from tensorboardX.record_writer import RecordWriter

from mdistiller.engine import hooks
from mdistiller.engine.folder import writers
from mdistiller.engine.folder.writers import CsvWriter, TensorboardWriter, WandbWriter, WorklogWriter
from mdistiller.engine.task import Classification

ROW = {"epoch": 1, "lr": 0.0005, "train_acc": 50.0, "train_loss": 1.25}
SCORED = {**ROW, "epoch": 2, "test_acc": 61.256, "test_acc_top5": 90.0, "test_loss": 1.5, "loss/kd": 0.5}


def test_csv_gains_columns_and_forgets_what_lies_behind_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = CsvWriter(path)
    writer.start([], 0)
    for row in (ROW, SCORED):
        writer.write_epoch(row)
    assert path.read_text().splitlines() == [
        "epoch,lr,train_acc,train_loss,test_acc,test_acc_top5,test_loss,loss/kd",
        "1,0.0005,50.0,1.25,,,,",
        "2,0.0005,50.0,1.25,61.256,90.0,1.5,0.5",
    ]
    CsvWriter(path).start([ROW], 4)
    assert path.read_text().splitlines() == ["epoch,lr,train_acc,train_loss", "1,0.0005,50.0,1.25"]


def test_worklog_has_mdistillers_form_and_keeps_small_rates(tmp_path):
    writer = WorklogWriter(tmp_path / "worklog.txt", Classification.measures)
    writer.start([], 0)
    writer.write_epoch(SCORED)
    writer.finish({"best": {"top1": 61.256}})
    line = "-" * 25
    assert (tmp_path / "worklog.txt").read_text() == (
        f"{line}\nepoch: 2\nlr: 0.0005\ntrain_acc: 50.00\ntrain_loss: 1.25\ntest_acc: 61.26\ntest_acc_top5: 90.00\n"
        f"test_loss: 1.50\n{line}\nbest_acc\t61.26"
    )


class Events:
    """In place of the file."""

    def __init__(self, folder, purge_step=None):
        self.purge_step, self.scalars = purge_step, []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self): ...


def test_tensorboard_frequency_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "Events", Events)
    writer = TensorboardWriter(tmp_path, 2)
    writer.start([ROW], 4)
    for step in (5, 6):
        writer.write_step(step, torch.tensor(1.5), 0.1)
    writer.write_epoch(SCORED)
    assert writer.events.purge_step == 2
    assert writer.steps.purge_step == 5  # steps of finished epochs stay
    assert writer.steps.scalars == [("step/train_loss", 1.5, 6), ("step/lr", 0.1, 6)]
    assert ("test_acc", 61.256, 2) in writer.events.scalars


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    make_trainer(tmp_path, SOLVER__EPOCHS=1).train()
    assert "pip install tensorboardX" in capsys.readouterr().out


def test_training_goes_on_when_its_events_cannot_be_written(tmp_path, monkeypatch, capsys):
    """With a thread between the run and the file, the run once waited for ever."""

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=2, LOG__TENSORBOARD_FREQ=1)
    monkeypatch.setattr(RecordWriter, "write", refuse)
    threads = threading.active_count()
    assert trainer.train()["status"] == "finished"
    assert threading.active_count() == threads
    assert capsys.readouterr().out.count("WARNING: no more TensorBoard files") == 1


def test_two_starts_in_one_second_write_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for _ in range(2):
        writers.Events(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 2


class FakeWandb(types.SimpleNamespace):
    def __init__(self):
        super().__init__(logged=[], summary={}, finished=False)

    def init(self, **options):
        self.options = options
        return self

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_run_only_when_asked_for(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    make_trainer(tmp_path / "off", SOLVER__EPOCHS=1).train()
    assert not fake.logged
    trainer = make_trainer(tmp_path / "on", SOLVER__EPOCHS=2, LOG__WANDB=True, EXPERIMENT__TAG="kd,small")
    results = trainer.train()
    assert fake.options["tags"] == ["kd", "small"]
    assert fake.options["config"]["SOLVER"]["EPOCHS"] == 2
    assert [row["epoch"] for row in fake.logged] == [1, 2]
    assert fake.summary["last_acc"] == results["last"]["top1"]
    assert fake.finished


def test_a_failing_wandb_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    writer = WandbWriter(tiny_config(tmp_path), tmp_path, Classification().headline)
    writer.start([], 0)
    writer.write_epoch(ROW)
    writer.finish({})
    writer.close()
    assert "no network" in capsys.readouterr().out


class SlowLoader:
    """A loader that keeps the loop waiting."""

    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for item in self.loader:
            time.sleep(self.seconds)
            yield item


def test_waiting_for_data_counts_as_data_time(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=1)
    trainer.train_loader = SlowLoader(trainer.train_loader, 0.05)
    clock = next(hook for hook in trainer.hooks if isinstance(hook, hooks.Clock))
    trainer.train()
    assert 4 * 0.05 <= clock.seconds["data"] <= clock.seconds["train"]
    assert trainer.results["seconds"]["evaluation"] > 0
