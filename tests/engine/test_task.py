"""Another task than classification, in a file of its own: a regression, of which lower errors are better."""

import csv
import json
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import yaml
from cli_runner import run_tool
from plugin_files import SQUARES, forgotten, write
from runs import TINY, make_trainer, same_state, teacher_file
from torch import nn

from mdistiller.dataset.subsets import hold_out, reduce_train
from mdistiller.engine.folder.checkpoint import load_checkpoint, load_weights
from mdistiller.engine.task import LOSS, Classification, Measure, Score, Task, task_of
from mdistiller.plugins import load_method_file
from mdistiller.registry import InputError, task_dict
from mdistiller.reports import load_plan, runner

DRIVER = Path(__file__).with_name("crash_driver.py")


@pytest.fixture(autouse=True)
def clean_slate():
    with forgotten():
        yield


def settings(folder, **values):
    return {
        **TINY,
        "DISTILLER.PLUGINS": [str(write(folder, "squares", SQUARES))],
        "DISTILLER.TYPE": "MIMIC",
        "DISTILLER.TEACHER_CKPT": teacher_file(folder, classes=2),
        "DATASET.TYPE": "squares",
        "DATASET.TRAIN_PER_CLASS": 0,
        "DATASET.TEST.BATCH_SIZE": 10,
        "LOG.PREFIX": str(folder),
        **{key.replace("__", "."): value for key, value in values.items()},
    }


def options(folder, **values):
    return [part for item in settings(folder, **values).items() for part in item]


def trainer_of(folder, **values):
    return make_trainer(folder, **{key.replace(".", "__"): value for key, value in settings(folder, **values).items()})


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_regression_runs_by_the_commands_with_its_own_numbers_and_names(tmp_path):
    done = run_tool("train", options(tmp_path, SOLVER__EPOCHS=4, SOLVER__EMA_DECAY=0.5))
    assert done.code == 0, done.err
    folder = tmp_path / "distill" / "default"
    results, rows = json.loads((folder / "results.json").read_text()), rows_of(folder)
    assert list(results["last"]) == ["mae", "mse", "epoch", "images", "split"]
    assert list(results["teacher"]) == ["name", "checkpoint", "sha256", "mae", "mse"]
    assert {"train_mae", "train_loss", "loss/mse", "loss/mimic", "test_mae", "test_mse", "test_mae_ema"} < set(rows[0])
    assert not any("acc" in column or "top" in column for column in rows[0])
    scores = [float(row["test_mae"]) for row in rows]
    best = min(scores)
    assert (results["best"]["mae"], results["best"]["epoch"]) == (best, max(scores.index(s) + 1 for s in [best]))
    assert results["last"]["mae"] == scores[-1]
    assert results["mean_of_last"]["mae"] == pytest.approx(sum(scores) / 4)
    last = results["last"]
    line = f"test MAE {last['mae']:.3f}, MSE {last['mse']:.4f}| "
    assert line in done.out
    assert f"Last: MAE {last['mae']:.3f} on 24 test images| best (epoch {results['best']['epoch']}, " in done.out
    assert f"Teacher resnet8 ({tmp_path}/resnet8_2): MAE " in done.out
    log = (folder / "worklog.txt").read_text()
    assert f"test_mae: {last['mae']:.3f}\ntest_mse: {last['mse']:.3f}\n" in log
    assert log.endswith(f"best_mae\t{best:.3f}")

    done = run_tool("eval", ["-m", "resnet8", "-c", folder / "student_last", "-d", "squares", *options(tmp_path)])
    assert f"resnet8 on 24 test images of squares: MAE {last['mae']:.3f}, MSE {last['mse']:.4f}" in done.out, done.err
    arguments = ["-m", "resnet8", "-c", folder / "student_last", "-d", "squares", "--against", "resnet8"]
    done = run_tool("eval", [*arguments, "--against-ckpt", folder / "student_best", *options(tmp_path)])
    assert "--against needs class numbers, integers (N,); the data set's targets are float32 (N, 2)" in done.err


@pytest.mark.parametrize("shape", [(), (2,)], ids=["(N,)", "(N, d)"])
def test_a_score_is_over_images_not_batches(tmp_path, shape):
    load_method_file(write(tmp_path, "squares", SQUARES))
    task = task_dict["regression"]()
    network = nn.Flatten()
    image, target = torch.arange(10.0).view(5, 2)[:, : 2 if shape else 1], torch.ones(5, *shape)
    loader = [{"image": image[:4], "target": target[:4]}, {"image": image[4:], "target": target[4:]}]
    network.weight = nn.Parameter(torch.zeros(1))  # tells the device
    score = task.evaluate(network, loader)
    error = image - target.view_as(image)
    assert score.values == pytest.approx({"mae": error.abs().mean().item(), "mse": error.square().mean().item()})
    assert (score.headline, score.count) == (score.values["mae"], 5)
    assert network.training
    with pytest.raises(InputError, match="nothing to evaluate on"):
        task.evaluate(network, [])


def train(moment, count, number, arguments):
    command = [sys.executable, DRIVER, moment, str(count), number, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def what_a_run_leaves(folder):
    state = load_checkpoint(folder / "latest")
    state["hooks"].pop("Clock")
    state["results"].pop("seconds")
    state.pop("config")
    return state, (folder / "metrics.csv").read_bytes(), (folder / "worklog.txt").read_bytes()


def test_a_killed_regression_goes_on_to_the_bit(tmp_path):
    values = {"DATASET__VAL_FRACTION": 0.2, "LOG__SAVE_EVERY_STEPS": 3, "SOLVER__EMA_DECAY": 0.5}
    trainer_of(tmp_path, **values, LOG__PREFIX=str(tmp_path / "whole")).train()
    arguments = options(tmp_path, **values, LOG__PREFIX=str(tmp_path / "parts"))
    assert train("step", 7, "SIGKILL", arguments).returncode == -signal.SIGKILL
    done = run_tool("train", ["--resume", *arguments])
    assert done.code == 0, done.err
    whole, parts = (what_a_run_leaves(tmp_path / name / "distill" / "default") for name in ("whole", "parts"))
    for state in (whole[0], parts[0]):
        state["results"].pop("method_file", None)
        state["results"].pop("status", None)
    assert same_state(parts, whole)


def test_the_lowest_error_on_the_validation_images_is_the_best(tmp_path):
    trainer = trainer_of(tmp_path, DATASET__VAL_FRACTION=0.25, DATASET__TRAIN_FRACTION=0.5, SOLVER__EPOCHS=4)
    assert (trainer.train_loader.num_data, len(trainer.val_loader.dataset)) == (15, 10)
    results = trainer.train()
    scores = [float(row["val_mae"]) for row in rows_of(trainer.folder)]
    assert results["best"]["epoch"] == 1 + scores.index(min(scores))
    assert results["validation"]["best"]["mae"] == min(scores)
    student = trainer.distiller.student
    student.load_state_dict(load_weights(trainer.folder / "student_best"))
    assert results["best"]["mae"] == trainer.task.evaluate(student, trainer.test_loader).headline


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"DATASET__TRAIN_PER_CLASS": 3}, "DATASET.TRAIN_PER_CLASS"),
        ({"DISTILLER__TYPE": "NONE", "DATASET__MIXUP_ALPHA": 0.5}, "DATASET.MIXUP_ALPHA"),
        ({"DISTILLER__TYPE": "CRD"}, "contrastive_index"),
    ],
)
def test_what_reads_class_numbers_says_so(tmp_path, values, named):
    with pytest.raises(InputError, match=f"{named} needs class numbers, .* targets are float32 \\(N, 2\\)"):
        trainer_of(tmp_path, **values)


def test_subsets_of_targets_that_are_no_class_numbers_are_drawn_from_all_images():
    targets = torch.rand(20, 3)
    rest, held_out = hold_out(targets, 0.25, seed=1)
    assert (len(rest), len(held_out)) == (15, 5)
    assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(20))
    assert len(reduce_train(targets, 0.1, 0, seed=1)) == 2


class InThisProcess:
    """Stands in for the pool of processes, which take seconds to start."""

    def __init__(self, *_): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, argument):
        future = Future()
        future.set_result(function(argument))
        return future


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan of two methods on the squares, and the file that it stands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    given = settings(tmp_path, SOLVER__EPOCHS=2)
    given.pop("LOG.PREFIX")
    Path("squares.yaml").write_text(yaml.safe_dump({"DATASET": {"TYPE": given.pop("DATASET.TYPE")}}))
    method = given.pop("DISTILLER.TYPE")
    tree = {
        "TITLE": "squares",
        "OUTPUT": "output/squares",
        "SEEDS": [0, 1],
        "PAIRS": {"res8": {}},
        "METHODS": {
            name: {"CONFIG": "squares.yaml", "OPTIONS": {"DISTILLER.TYPE": kind}}
            for name, kind in (("plain", "PLAIN_SQUARES"), ("mimic", method))
        },
        "OPTIONS": given,
        "CLAIMS": [["plain", "mimic"], ["mimic", "plain"], ["mimic", "plain", 50.0]],
    }
    Path("plan.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return tree


def test_a_plan_tabulates_it_and_the_lower_error_wins(plan):
    done = run_tool("reproduce", ["--plan", "plan.yaml", "--jobs", 1, "--allow-plugins"])
    assert done.err == ""
    table = list(csv.reader(Path("output/squares/table.csv").read_text().splitlines()))
    assert table[0][2] == "last-epoch MAE [px]"
    means = {}
    teacher, *rows = table[1:]
    assert teacher[0] == "teacher (resnet8)" and float(teacher[2]) > 0
    for method, _, mean, *_ in rows:
        paths = [Path(f"output/squares/{method}/res8/seed{seed}/results.json") for seed in (0, 1)]
        values = [json.loads(path.read_text())["last"]["mae"] for path in paths]
        means[method] = sum(values) / 2
        assert mean == f"{means[method]:.3f}"
        assert all(
            f"{method}, res8, seed {seed}: {value:.3f} px after" in done.out for seed, value in enumerate(values)
        )
    gain = means["mimic"] - means["plain"]  # of the plain student, whose error is lower by so much
    assert f" mimic on res8: {gain:+.3f} px, larger std " in done.out
    assert f" plain on res8: {-gain:+.3f} px, larger std " in done.out
    assert f"mimic is within 50 px of plain on res8: {gain:+.3f} px seed by seed, std " in done.out
    assert "top-1" not in done.out


def test_a_plan_of_two_tasks_is_refused(plan):
    plan["METHODS"]["digits"] = {"CONFIG": "digits.yaml"}
    Path("digits.yaml").write_text(yaml.safe_dump({"DATASET": {"TYPE": "digits"}}))
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match=r"scored by .*(MAE on squares.* top-1 on digits|top-1 on digits.* MAE)"):
        load_plan("plan.yaml", allow_plugins=True)


def test_an_unknown_task_is_named_before_anything_is_loaded(tmp_path):
    text = SQUARES.replace('task = "regression"', 'task = "regresion"')
    arguments = options(tmp_path)
    write(tmp_path, "squares", text)
    done = run_tool("train", arguments)
    assert done.code == 2
    assert "no task named 'regresion'; closest: regression" in done.err


def test_the_direction_of_a_measure():
    lower, higher = (Measure("m", "m", "m", higher_is_better=better) for better in (False, True))
    assert lower.gain(1.0, 3.0) == higher.gain(3.0, 1.0) == 2.0
    assert Classification().headline.difference(1.5) == "+1.50 points"
    assert Measure("m", "m", "MAE").difference(1.5) == "+1.5000"
    assert Measure("m", "m", "MAE", "px").difference(1.5, "g") == "1.5 px"


class MeanOfSquares(Task):
    """A score that is no mean over images: the root of one."""

    measures = (Measure("rms", "rms", "RMS", higher_is_better=False),)

    def sums(self, output, target):
        return (output - target).square().sum()[None]

    def values(self, sums, count):
        return {"rms": (sums[0] / count) ** 0.5}


class OnlyLoss(Task):
    measures = (LOSS,)

    def sums(self, output, target):
        return (output - target).square().sum()[None]


def test_a_loss_may_be_all_that_there_is(tmp_path):
    load_method_file(write(tmp_path, "squares", SQUARES))
    task_dict["regression"] = OnlyLoss
    trainer = trainer_of(tmp_path, SOLVER__EPOCHS=1)
    results = trainer.train()
    last = results["last"]["loss"]
    assert list(results["last"]) == ["loss", "epoch", "images", "split"]
    assert results["teacher"]["loss"] > 0
    log = (trainer.folder / "worklog.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in log[3:5]] == ["train_loss", "test_loss"]
    assert log[-1] == f"best_loss\t{last:.4f}"


def test_a_task_may_compute_its_values_from_the_sums():
    network = nn.Identity()
    network.weight = nn.Parameter(torch.zeros(1))
    loader = [
        {"image": torch.tensor([3.0]), "target": torch.zeros(1)},
        {"image": torch.tensor([4.0]), "target": torch.zeros(1)},
    ]
    assert MeanOfSquares().evaluate(network, loader) == Score(12.5**0.5, {"rms": 12.5**0.5}, 2)


def test_the_library_s_data_sets_are_classified(tmp_path):
    trainer = make_trainer(tmp_path)
    assert isinstance(trainer.task, Classification)
    assert isinstance(task_of(trainer.cfg), Classification)
