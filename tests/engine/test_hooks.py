"""Hooks of a script or of a method file: called at their place, their columns written, their state resumed."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import run_tool
from plugin_files import TWO_VIEWS, forgotten, write
from runs import TINY, make_trainer, same_state, tiny_config

from mdistiller.engine.folder.checkpoint import load_checkpoint
from mdistiller.engine.hooks import Checkpoints, Hook, Meters, Writers, add_hooks
from mdistiller.engine.run import run
from mdistiller.plugins import hooks_of, load_method_file
from mdistiller.registry import InputError

DRIVER = Path(__file__).with_name("crash_driver.py")
# The mean of the highest outputs over all steps so far, and how far the score is from perfect.
CONFIDENCE = """
    from mdistiller.engine.hooks import Hook

    class Confidence(Hook):
        steps, total = 0, 0.0

        def after_step(self, output):
            self.steps += 1
            self.total += output.logits.max(1).values.mean().item()

        def after_epoch(self):
            self.trainer.row["confidence"] = self.total / self.steps
            if "test_acc" in self.trainer.row:
                self.trainer.row["error"] = 100 - self.trainer.row["test_acc"]
                self.trainer.results["error"] = self.trainer.row["error"]

        def state_dict(self):
            return {"steps": self.steps, "total": self.total}

        def load_state_dict(self, state):
            self.__dict__.update(state)

    HOOKS = [Confidence]
"""


@pytest.fixture(autouse=True)
def clean_slate():
    with forgotten():
        yield


def confidence(folder):
    """The hook's class."""
    return load_method_file(write(folder, "confidence", CONFIDENCE)).hooks[0]


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class StopAt(Hook):
    """Ends the run in the middle of an epoch."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def after_step(self, output):
        if self.trainer.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("as_class", [True, False], ids=["class", "instance"])
def test_a_hook_of_a_script_adds_columns_and_goes_on_after_a_stop(tmp_path, as_class):
    cls = confidence(tmp_path)
    whole = run(tiny_config(tmp_path / "whole"), hooks=[cls])
    cfg = tiny_config(tmp_path / "parts", LOG__SAVE_EVERY_STEPS=3)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, hooks=[cls if as_class else cls(), StopAt(7)])
    parts = run(cfg, hooks=[cls if as_class else cls()], resume=True)
    folders = [tmp_path / name / "distill" / "default" for name in ("whole", "parts")]
    rows = rows_of(folders[0])
    assert [float(row["error"]) for row in rows] == [100 - float(row["test_acc"]) for row in rows]
    assert len({row["confidence"] for row in rows}) == 3
    assert parts["error"] == whole["error"]
    assert folders[0].joinpath("metrics.csv").read_bytes() == folders[1].joinpath("metrics.csv").read_bytes()
    assert load_checkpoint(folders[1] / "latest")["hooks"]["Confidence"]["steps"] == 12


def test_a_hook_of_a_file_is_killed_and_resumed_by_the_commands(tmp_path):
    path = write(tmp_path, "confidence", CONFIDENCE)
    arguments = {**TINY, "LOG.SAVE_EVERY_STEPS": 3, "DISTILLER.TYPE": "NONE", "DISTILLER.PLUGINS": [str(path)]}

    def options(name):
        return [str(part) for item in {**arguments, "LOG.PREFIX": tmp_path / name}.items() for part in item]

    assert run_tool("train", options("whole")).code == 0
    command = [sys.executable, DRIVER, "step", "7", "SIGKILL", *options("parts")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    done = run_tool("train", ["--resume", *options("parts")])
    assert done.code == 0, done.err
    assert "1 epoch and 2 of 4 steps are done" in done.out
    whole, parts = (tmp_path / name / "distill" / "default" for name in ("whole", "parts"))
    assert "confidence" in rows_of(parts)[0]
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    states = [load_checkpoint(folder / "latest")["hooks"]["Confidence"] for folder in (whole, parts)]
    assert states[0]["steps"] == 12
    assert same_state(*states)


def test_a_method_s_own_file_may_hold_hooks(tmp_path):
    text = CONFIDENCE + TWO_VIEWS.replace("from .smoothing import smoothed", "smoothed = F.cross_entropy")
    file = load_method_file(write(tmp_path, "weak_strong", text))
    assert hooks_of([], "WeakStrong") == hooks_of([str(file.path)], "WeakStrong") == list(file.hooks)
    assert [hook.__name__ for hook in file.hooks] == ["Confidence"]
    assert hooks_of([], "KD") == []


def test_the_place_is_behind_what_measures_and_before_what_writes(tmp_path):
    class One(Hook): ...

    class Two(Hook): ...

    trainer = make_trainer(tmp_path)
    two = Two()
    add_hooks(trainer, [One])
    add_hooks(trainer, [two])
    kinds = [type(hook) for hook in trainer.hooks]
    places = [kinds.index(kind) for kind in (Meters, One, Two, Writers, Checkpoints)]
    assert places == sorted(places)
    assert two.trainer is trainer


def test_what_is_no_hook_or_has_a_name_that_is_taken_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    count = len(trainer.hooks)
    for given in (int, "Confidence", None):
        with pytest.raises(InputError, match=r"is no hook; derive its class from mdistiller\.engine\.hooks\.Hook"):
            add_hooks(trainer, [given])
    with pytest.raises(InputError, match="two hooks are called Meters"):
        add_hooks(trainer, [type("Meters", (Hook,), {})])
    with pytest.raises(InputError, match="two hooks are called Confidence"):
        add_hooks(trainer, [confidence(tmp_path), confidence(tmp_path)()])
    assert len(trainer.hooks) == count + 1


def test_another_project_s_variable_of_that_name_does_no_harm(tmp_path):
    text = TWO_VIEWS.replace("from no_such_toolkit import st", "HOOKS = {}").replace(
        "from .smoothing import smoothed", "smoothed = F.cross_entropy"
    )
    assert load_method_file(write(tmp_path, "weak_strong", text)).hooks == ()
