"""Every method from the command line on real images: it trains, is stopped, goes on, and ends as if never stopped.

Belongs here: a property that every registered method must have when ``tools/train.py`` runs it.
"""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
from cli_runner import ROOT, run_tool
from method_cases import FALLING, TEACHER_METHODS, weights
from runs import same_state, teacher_file

from mdistiller.dataset import dataset_dict
from mdistiller.engine import trainer
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import load_checkpoint

TYPES = {path: load_config(path).DISTILLER.TYPE for path in sorted((ROOT / "configs").glob("*/[!_]*/res20_res8.yaml"))}
CONFIGS = {path: method for path, method in TYPES.items() if path.parts[-3] == "digits"}
ON_SHAPES = {path: method for path, method in TYPES.items() if path.parts[-3] == "shapes"}
SHORT = {"DISTILLER.TEACHER": "resnet8", "SOLVER.EPOCHS": 2, "SOLVER.DEVICE": "cpu", "LOG.EVAL_FREQ": 2}
TINY = {  # two steps an epoch
    "digits": SHORT
    | {"DATASET.IMAGE_SIZE": 8, "DATASET.TRAIN_PER_CLASS": 3, "SOLVER.BATCH_SIZE": 15, "SOLVER.LR_DECAY_STAGES": [1]},
    "shapes": SHORT
    | {"DATASET.SHAPES.TRAIN_SIZE": 200, "DATASET.SHAPES.TEST_SIZE": 100, "SOLVER.BATCH_SIZE": 100}
    | {"DATASET.TEST.BATCH_SIZE": 100},
}


def name_of(path):
    return "-".join(path.parts[-3:-1])


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_every_method_has_a_config_for_digits(method):
    assert method in CONFIGS.values()


@pytest.mark.parametrize("method", ["VRM", "MDR", "DIST", "DIST_PLUS", "DCD"])
def test_the_library_s_own_methods_have_configs_for_shapes(method):
    assert method in ON_SHAPES.values()


@pytest.mark.parametrize("config", [*CONFIGS, *ON_SHAPES], ids=name_of)
def test_a_stopped_run_goes_on_to_the_same_bits(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = config.parts[-3]
    teacher = teacher_file(tmp_path, classes=dataset_dict[project].num_classes)
    options = TINY[project] | {"DISTILLER.TEACHER_CKPT": teacher}

    def train(name, *flags):
        settings = options | {"LOG.PREFIX": "output", "EXPERIMENT.NAME": name}
        return run_tool("train", ["--cfg", config, *flags, *(part for item in settings.items() for part in item)])

    outcome = train("whole")
    assert (outcome.code, outcome.err) == (0, "")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "to_batch", terminated_at(3, trainer.to_batch))
        assert train("parts").code == 128 + signal.SIGTERM
    outcome = train("parts", "--resume")
    assert (outcome.code, outcome.err) == (0, "")

    whole, parts = (Path("output") / project / name for name in ("whole", "parts"))
    assert same_state(*(load_checkpoint(folder / "latest")["model"] for folder in (whole, parts)))
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, parts)]
    assert results[0]["last"] == results[1]["last"]
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert len(rows) == 2 and all(float(row["train_loss"]) > 0 for row in rows)


def terminated_at(step, original):
    """``original``, which sends the process SIGTERM when it is called for the given time."""
    calls = 0

    def to_batch(*args):
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    return to_batch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A resnet20 that has seen all training images twice."""
    folder = tmp_path_factory.mktemp("teacher")
    options = {"LOG.PREFIX": folder, "SOLVER.EPOCHS": 2, "SOLVER.LR_DECAY_STAGES": [], "SOLVER.DEVICE": "cpu"}
    config = ROOT / "configs" / "digits" / "vanilla" / "res20.yaml"
    assert run_tool("train", ["--cfg", config, *(part for item in options.items() for part in item)]).code == 0
    return folder / "digits" / "vanilla,res20" / "student_last"


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_own_terms_fall_in_a_run(config, tmp_path, teacher):
    method = CONFIGS[config]
    options = {"DISTILLER.TEACHER_CKPT": teacher, "LOG.PREFIX": tmp_path, "EXPERIMENT.NAME": "a"}
    options |= {"SOLVER.EPOCHS": 15, "SOLVER.LR": 0.02, "SOLVER.DEVICE": "cpu"}
    options |= weights(method, ce=0.0, own=1.0) | FALLING.get(method, {})
    outcome = run_tool("train", ["--cfg", config, *(part for item in options.items() for part in item)])
    assert (outcome.code, outcome.err) == (0, "")
    with (tmp_path / "digits" / "a" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert min(losses[-3:]) < 0.8 * losses[0]
