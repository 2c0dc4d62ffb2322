"""``tools/bench.py`` on tiny settings: every command, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from cli_runner import run_tool

from mdistiller.bench.commands import COMMANDS, TRAIN_VARIANTS
from mdistiller.bench.subjects import baseline_of
from mdistiller.engine.cfg import load_config

TINY = ["DATASET.TYPE", "digits", "DATASET.TRAIN_PER_CLASS", 2, "DATASET.IMAGE_SIZE", 8, "SOLVER.BATCH_SIZE", 10,
        "DISTILLER.TEACHER", "resnet8", "DISTILLER.STUDENT", "resnet8", "SOLVER.DEVICE", "cpu",
        "DATASET.NUM_WORKERS", 0, "DATASET.TEST.BATCH_SIZE", 300]  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(tmp_path, *arguments, settings=()):
    out = tmp_path / "report.json"
    done = run_tool("bench", [*arguments, "--rounds", 2, "--steps", 1, "--json", out, "--set", *TINY, *settings])
    assert done.code == 0, done.err
    report = json.loads(out.read_text())
    assert all(row["name"] in done.out for row in report["rows"])
    assert report["machine"]["processor"] in done.out
    return report, {row["name"]: row for row in report["rows"]}


def assert_timed(row):
    for clock in ("wall_ms", "cpu_ms"):
        assert 0 <= row[clock]["low"] <= row[clock]["median"] <= row[clock]["high"]
    assert row["wall_ms"]["median"] > 0 and row["ratio"]["median"] > 0


@pytest.mark.parametrize("what", ["step", "loss"])
def test_methods_against_kd_with_as_many_views(tmp_path, what):
    report, rows = bench(tmp_path, what, "--methods", "DIST", "VRM")
    assert set(rows) == ({"KD", "DIST", "KD_TWO_VIEWS", "VRM"} if what == "step" else {"KD", "DIST", "VRM"})
    assert rows["KD"]["ratio"]["median"] == 1
    assert rows["VRM"]["baseline"] == (baseline_of("VRM") if what == "step" else "KD")
    for row in rows.values():
        assert_timed(row)
    assert (report["rounds"], report["clock"], report["student"]) == (2, "cpu", "resnet8")


def test_by_default_all_methods_with_a_teacher(tmp_path):
    _, rows = bench(tmp_path, "loss")
    assert {"KD", "KD_TWO_VIEWS", "DIST", "DIST_PLUS", "DCD", "MDR", "VRM"} <= set(rows)
    assert "NONE" not in rows


def test_data_against_pillow(tmp_path):
    _, rows = bench(tmp_path, "data")
    assert list(rows) == [f"{name}: {way}" for name in ("KD", "KD_TWO_VIEWS") for way in ("Pillow", "batched")]
    assert all(row["images_per_second"] > 0 for row in rows.values())


def test_teacher_with_one_speed_up_more_each_time(tmp_path):
    _, rows = bench(tmp_path, "teacher")
    assert next(iter(rows)) == "float32" and len(rows) == 6
    for row in rows.values():
        assert_timed(row)


def test_both_memory_layouts_of_the_student(tmp_path):
    _, rows = bench(tmp_path, "layout")
    assert list(rows) == ["off", "on"]
    for row in rows.values():
        assert_timed(row)


def test_whole_epochs_against_the_old_loop(tmp_path):
    _, rows = bench(tmp_path, "train", "--methods", "KD", "--variants", "float32", "bf16")
    assert list(rows) == ["KD: old loop", "KD: float32", "KD: bf16"]
    for name in ("KD: float32", "KD: bf16"):
        assert 0 < rows[name]["outside_steps"] < 1 and 0 <= rows[name]["waiting_for_data"] < 1
        assert rows[name]["images_per_second"] > 0


def test_memory_in_a_process_of_its_own(tmp_path):
    _, rows = bench(tmp_path, "memory", "--methods", "KD")
    assert list(rows) == ["KD"]
    assert rows["KD"]["megabytes"] >= 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["step", "--methods", "KDD"], "--methods: no method named 'KDD'; closest"),
        (["train", "--variants", "bf17"], "--variants: no variant named 'bf17'; closest"),
        (["step", "--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["step", "--steps", "-1"], "--steps must be 1 or more, got -1"),
        (["step", "--threads", "0"], "--threads must be from 1 to 1024, got 0"),
        (["step", "--picture", "step.png"], "--picture draws what profile measures, not step"),
        (["step", "--set", "SOLVER.AMB", "off"], "SOLVER.AMP"),
        (["step", "--set", "SOLVER.AMP"], ""),
        (["step", "--cfg", "nowhere.yaml"], "nowhere.yaml"),
        (["data", "--json", "nowhere/file.json", "--rounds", "1", "--set", *TINY], "cannot write nowhere/file.json"),
    ],
)
def test_bad_arguments_end_with_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run_tool("bench", arguments)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err


def test_variants_are_settings_of_a_run():
    for values in TRAIN_VARIANTS.values():
        options = [part for key, value in values.items() for part in (key.replace("__", "."), value)]
        load_config(options=["DISTILLER.TYPE", "KD", "DATASET.VIEW_WEAK", "plain", *options])
    assert set(COMMANDS) == {"loss", "step", "data", "teacher", "layout", "train", "profile", "memory"}
