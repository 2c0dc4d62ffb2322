"""``tools/bench.py profile``: the parts of a step sum to it, and the loops are as they were when it is over."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cli_runner import run_tool
from test_commands import TINY, threads  # noqa: F401  (a fixture)

from mdistiller.bench import old_loop
from mdistiller.bench.epochs import OldRun, OwnRun, with_epochs
from mdistiller.bench.profile import OUTSIDE, PARTS, STEP, Parts, _profile_old, _profile_own, table_of_parts
from mdistiller.engine.cfg import load_config


class Hand:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_what_runs_within_a_part_counts_for_itself_alone():
    clock = Hand()
    parts = Parts(clock)
    student = parts.timed(clock.spend, "student")
    clock.spend(100)
    parts.begin()
    with parts.part("losses"):
        clock.spend(1)
        student(2)
        clock.spend(4)
    clock.spend(8)
    with parts.part(OUTSIDE):
        student(16)
    found = parts.end()
    assert {name: value for name, value in found.items() if value} == {
        "losses": 5, "student": 2, "meters": 8, OUTSIDE: 16
    }  # fmt: skip


def test_a_part_that_fails_ends_too():
    clock = Hand()
    parts = Parts(clock)
    with pytest.raises(ZeroDivisionError), parts.part("losses"):
        clock.spend(1)
        _ = 1 / 0
    clock.spend(2)
    assert (parts.end()["losses"], parts.seconds["meters"]) == (1, 2)


@pytest.fixture
def profiled(tmp_path):
    """The command on two methods, with a picture."""

    def run(*arguments):
        report, picture = tmp_path / "report.json", tmp_path / "step.png"
        arguments = [*arguments, "--rounds", 2, "--json", report, "--picture", picture]
        done = run_tool("bench", ["profile", *arguments, "--set", *TINY])
        assert (done.code, done.err) == (0, "")
        return json.loads(report.read_text()), done.out, picture.read_bytes()

    return run


def test_the_parts_sum_to_the_step(profiled):
    report, out, picture = profiled("--methods", "VRM", "NONE")
    assert picture.startswith(b"\x89PNG")
    assert [(row["method"], row["part"]) for row in report["rows"]] == [
        (method, part) for method in ("VRM", "NONE") for part in (*PARTS, STEP)
    ]
    assert all(row["name"] in out for row in report["rows"])
    for method in ("VRM", "NONE"):
        rows = {row["part"]: row for row in report["rows"] if row["method"] == method}
        for loop in ("old_ms", "own_ms"):
            medians = {part: row[loop]["median"] for part, row in rows.items()}
            whole = medians.pop(STEP)
            idle = {"teacher"} if method == "NONE" else set()
            assert {part for part, value in medians.items() if value <= 0} == idle
            assert sum(medians.values()) == pytest.approx(whole, rel=0.1)  # which another clock took
        assert rows[STEP]["ratio"]["median"] > 0


def test_the_loops_compute_what_they_did_and_nothing_stays_replaced(tmp_path):
    backward, to_device = torch.autograd.backward, old_loop.to_device
    cfg = with_epochs(load_config(options=list(map(str, TINY))), "VRM", 3)
    weights = []
    for turn, watched in enumerate((False, True)):
        run = OwnRun(cfg, tmp_path / str(turn))
        own = _profile_own(run, Parts(Hand())) if watched else run
        forwards = [network.__dict__.get("forward") for network in run.trainer.distiller.modules()]
        own.epoch()
        assert [network.__dict__.get("forward") for network in run.trainer.distiller.modules()] == forwards
        run.close()
        weights.append(run.trainer.distiller.state_dict())
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    old = OldRun(cfg, tmp_path / "old")
    before = dict(vars(old.distiller.student))
    _profile_old(old, Parts(Hand())).epoch()
    assert vars(old.distiller.student).keys() == before.keys()
    assert (torch.autograd.backward, old_loop.to_device) == (backward, to_device)


def test_evaluation_and_checkpoints_are_outside(tmp_path):
    """Only the student takes time, a second a call: in an evaluation it is not the step's."""
    cfg = with_epochs(load_config(options=list(map(str, TINY))), "KD", 3)
    run = OldRun(cfg, tmp_path)
    clock, forward = Hand(), run.distiller.student.forward

    def ticking(image):
        clock.spend(1)
        return forward(image)

    run.distiller.student.forward = ticking
    found = _profile_old(run, Parts(clock))
    found.epoch()
    assert len(run.train) and len(run.test)
    assert (found.epochs[0]["student"], found.epochs[0][OUTSIDE]) == (len(run.train), len(run.test))


def test_a_part_that_takes_no_time_has_no_ratio():
    nothing, something = ({"median": value, "low": value, "high": value} for value in (0.0, 2.0))
    row = {"name": "NONE: teacher forward", "old_ms": nothing, "own_ms": nothing, "ratio": something}
    assert table_of_parts([row], "wall")[1] == ("NONE: teacher forward", "0.00", "0.00", "", "")


def test_without_matplotlib_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run_tool("bench", ["profile", "--picture", "step.png", "--set", *TINY])
    assert done.code == 2 and done.out == ""
    assert "pictures need matplotlib: pip install matplotlib" in done.err


def test_a_picture_that_cannot_be_written(tmp_path):
    path = tmp_path / "nowhere" / "step.png"
    done = run_tool("bench", ["profile", "--rounds", 1, "--picture", path, "--set", *TINY])
    assert done.code == 2
    assert f"cannot write {path}" in done.err and "Traceback" not in done.err
