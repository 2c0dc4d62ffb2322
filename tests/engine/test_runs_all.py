"""Every method in runs: resuming changes no bit, and by the real command its own terms fall on real images."""

import csv
from pathlib import Path

import pytest
from cli_runner import ROOT, run_tool
from method_cases import FALLING, TEACHER_METHODS, weights
from runs import assert_resumes_to_the_bit

# Training before the training is as short as it gets.
SHORTER = {"MDR": {"MDR.SM_EPOCHS": 1}}


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, method):
    values = {key.replace(".", "__"): value for key, value in SHORTER.get(method, {}).items()}
    settings = {"SOLVER__EPOCHS": 2, "DATASET__TRAIN_PER_CLASS": 2, "LOG__EVAL_FREQ": 2}  # 3 steps an epoch
    assert_resumes_to_the_bit(tmp_path, 5, DISTILLER__TYPE=method, **settings, **values)


def train(config: str, *options: object) -> None:
    done = run_tool("train", ["--cfg", ROOT / "configs" / "digits" / config, *options, "SOLVER.DEVICE", "cpu"])
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A resnet20 that has seen all training images twice."""
    folder = tmp_path_factory.mktemp("teacher")
    train("vanilla/res20.yaml", "LOG.PREFIX", folder, "SOLVER.EPOCHS", 2, "SOLVER.LR_DECAY_STAGES", "[]")
    return folder / "digits" / "vanilla,res20" / "student_last"


@pytest.mark.slow
@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_own_terms_fall_on_digits_by_the_command(tmp_path, method, teacher):
    values = weights(method, ce=0.0, own=1.0) | FALLING.get(method, {}) | SHORTER.get(method, {})
    values |= {"DISTILLER.TYPE": method, "DISTILLER.TEACHER": "resnet20", "DISTILLER.TEACHER_CKPT": teacher}
    values |= {"DISTILLER.STUDENT": "resnet8", "LOG.PREFIX": tmp_path, "SOLVER.EPOCHS": 15, "SOLVER.LR": 0.02}
    train("_few_labels_.yaml", *(part for item in values.items() for part in item))
    losses = falling_losses(tmp_path / "digits" / "default")
    assert min(losses[-3:]) < 0.8 * losses[0]


def falling_losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]
