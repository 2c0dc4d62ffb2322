"""The committed plans, and what a plan's cells are. Bad plans are among the bad input of ``test_cli.py``."""

from __future__ import annotations

import pytest
from cli_runner import ROOT

from mdistiller.reports import load_plan

PLANS = sorted((ROOT / "configs" / "plans").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_committed_plans_load_and_say_how_to_run_them(path):
    assert load_plan(path).cells()
    assert f"# python tools/reproduce.py --plan configs/plans/{path.name}\n" in path.read_text()


def test_the_demo_is_fifteen_runs_and_a_teacher():
    plan = load_plan("configs/plans/demo.yaml")
    cells = plan.cells()
    (teacher,) = plan.teachers().values()
    assert len(cells) == len({cell.folder for cell in cells}) == 15
    assert [cell.method for cell in cells[:5]] == ["plain", "KD", "plain, two views", "KD, two views", "VRM"]
    assert [cell.seed for cell in cells[::5]] == [0, 1, 2]
    assert teacher.cfg.DISTILLER.STUDENT == "resnet20"
    for cell in cells:
        assert f"{teacher.folder}/student_last" == cell.cfg.DISTILLER.TEACHER_CKPT
        assert cell.seed == cell.cfg.EXPERIMENT.SEED
        assert cell.cfg.DATASET.TRAIN_PER_CLASS == 10
    assert cells[3].folder.as_posix() == "output/demo/KD_two_views/res20_res8/seed0"
    assert cells[3].console.as_posix() == "output/demo/KD_two_views/res20_res8/seed0.log"


def test_methods_differ_in_nothing_but_the_method():
    cells = load_plan("configs/plans/demo.yaml").cells()[:4]
    for cell in cells:
        cell.cfg.defrost()
        cell.cfg.DISTILLER.TYPE = cell.cfg.EXPERIMENT.NAME = cell.cfg.EXPERIMENT.TAG = ""
    assert all(cell.cfg == cells[0].cfg for cell in cells)


def test_options_of_the_method_count_before_those_of_the_pair_and_of_the_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        """
TITLE: "t"
OUTPUT: "output/t"
SEEDS: [0]
PAIRS: {res20_res8: {TEACHER: "configs/digits/vanilla/res20.yaml", OPTIONS: {SOLVER.LR: 0.02, KD.TEMPERATURE: 3}}}
METHODS:
  "KD": {CONFIG: "configs/digits/kd/{pair}.yaml"}
  "hot": {CONFIG: "configs/digits/kd/{pair}.yaml", OPTIONS: {KD.TEMPERATURE: 8}}
OPTIONS: {SOLVER.LR: 0.01, SOLVER.EPOCHS: 2}
"""
    )
    plan = load_plan(path)
    settings = [(c.cfg.SOLVER.EPOCHS, c.cfg.SOLVER.LR, c.cfg.KD.TEMPERATURE) for c in plan.cells()]
    assert settings == [(2, 0.02, 3.0), (2, 0.02, 8.0)]
    (teacher,) = plan.teachers().values()
    assert (teacher.cfg.SOLVER.EPOCHS, teacher.cfg.SOLVER.LR) == (2, 0.01)
