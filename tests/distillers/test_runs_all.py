"""Every method by the real command on digits: its own terms fall, and the student learns; over the registry."""

import csv
import json

import pytest
from cli_runner import run_tool
from method_cases import TEACHER_METHODS

from mdistiller.dataset.fields import wants_negatives
from mdistiller.engine.dot import is_task
from mdistiller.registry import distiller_dict

COMMON = {
    "DATASET.TYPE": "digits",
    "DATASET.NUM_WORKERS": 0,
    "DATASET.IMAGE_SIZE": 16,
    "DATASET.TRAIN_PER_CLASS": 40,
    "DATASET.TEST.BATCH_SIZE": 300,
    "DISTILLER.STUDENT": "resnet8",
    "DISTILLER.TEACHER": "resnet8",
    "SOLVER.BATCH_SIZE": 40,
    "SOLVER.EPOCHS": 12,
    "SOLVER.LR_DECAY_STAGES": [8],
    "SOLVER.DEVICE": "cpu",
    "EXPERIMENT.PROJECT": "all",
    "LOG.EVAL_FREQ": 12,
    "CRD.NCE.K": 64,
    "MDR.SM_EPOCHS": 2,
    "MDR.SM_LR_DECAY_STAGES": [1],
}


def train(method, values):
    merged = {**COMMON, "DISTILLER.TYPE": method, "EXPERIMENT.NAME": method, **values}
    outcome = run_tool("train", [part for item in merged.items() for part in item])
    assert outcome.code == 0, outcome.err
    return merged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("runs")
        patch.chdir(place)
        train("NONE", {})
        yield place


def without_warmups(method):
    cls = distiller_dict[method]
    return {f"{cls.section}.{key}": 0 for key in cls.defaults or {} if key.startswith("WARMUP")}


@pytest.mark.slow
@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_own_terms_fall_and_the_student_learns(folder, method):
    train(method, {"DISTILLER.TEACHER_CKPT": "output/all/NONE/student_last", **without_warmups(method)})
    with (folder / "output" / "all" / method / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    own = [name for name in rows[0] if name.startswith("loss/") and not is_task(name.removeprefix("loss/"))]
    sums = [sum(float(row[name]) for name in own) for row in rows]
    # Memory banks hold noise at first: an embedding is easily told from it.
    start = max(sums[:3]) if wants_negatives(distiller_dict[method]) else sums[0]
    assert own and sums[-1] < 0.9 * start, sums
    results = json.loads((folder / "output" / "all" / method / "results.json").read_text())
    assert results["last"]["top1"] > 50  # chance is 10
