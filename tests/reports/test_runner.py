"""Plans, run: what is done stays done, what changed runs again, what was interrupted goes on."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from cli_runner import ROOT, run_tool

from mdistiller.models import cifar_model_dict
from mdistiller.registry import RunError
from mdistiller.reports import load_plan, run_plan, runner

OUTPUT = Path("output/tiny")
KD = {"CONFIG": "configs/digits/kd/{pair}.yaml", "OPTIONS": {"DISTILLER.TEACHER": "resnet8"}}
PLAIN = {"CONFIG": "configs/digits/kd/{pair}.yaml", "OPTIONS": {"DISTILLER.TYPE": "NONE"}}
PLAN = {
    "TITLE": "Tiny: 40 images, two epochs",
    "OUTPUT": str(OUTPUT),
    "SEEDS": [0, 1],
    "PAIRS": {"res20_res8": {"TEACHER": "configs/digits/vanilla/res8.yaml"}},
    "METHODS": {"plain": PLAIN, "KD": KD},
    "OPTIONS": {
        "DATASET.TRAIN_PER_CLASS": 4,
        "SOLVER.BATCH_SIZE": 20,
        "SOLVER.EPOCHS": 2,
        "SOLVER.DEVICE": "cpu",
        "LOG.EVAL_FREQ": 1,
        "LOG.SAVE_CHECKPOINT_FREQ": 1,
    },
    "CLAIMS": [["KD", "plain"]],
    "HOW_TO_READ": "One of {images} images is {image_points:.2f} points.",
}
CELLS = [(method, seed) for seed in (0, 1) for method in ("plain", "KD")]


def folder_of(method: str, seed: int = 0) -> Path:
    return OUTPUT / method / "res20_res8" / f"seed{seed}"


def write_plan(**changes) -> str:
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return "plan.yaml"


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the plan ran to its end, in processes of its own; and what was printed."""
    place = tmp_path_factory.mktemp("finished")
    (place / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcome = run_tool("reproduce", ["--plan", write_plan(), "--jobs", 2])
    assert (outcome.code in (0, 1), outcome.err) == (True, "")
    return place, outcome.out


@pytest.fixture
def printed(finished, tmp_path, monkeypatch):
    """The test stands in a copy of that folder, where cells run in the test's own process."""
    place, out = finished
    shutil.copytree(place, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    return out


def run_again(**changes) -> list[str]:
    """Run the changed plan; the lines about its runs."""
    lines: list[str] = []
    run_plan(load_plan(write_plan(**changes)), jobs=1, say=lines.append)
    return lines


def ran(lines: list[str]) -> list[str]:
    """Which cells ran: ``"KD 1"`` is method KD with seed 1."""
    return sorted(
        f"{line.split('] ')[1].split(', ')[0]} {line.split('seed ')[1].split(':')[0]}" for line in lines if "[" in line
    )


def set_results(method: str, seed: int, **values) -> None:
    path = folder_of(method, seed) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def results_of(method: str, seed: int = 0) -> dict:
    return json.loads((folder_of(method, seed) / "results.json").read_text())


def test_what_is_printed_and_written(printed):
    top1 = {method: [results_of(method, seed)["last"]["top1"] for seed in (0, 1)] for method in ("plain", "KD")}
    with (OUTPUT / "table.csv").open(newline="") as file:
        teacher, *rows = csv.DictReader(file)
    scored = results_of("KD")["teacher"]["top1"]
    assert (teacher["method"], teacher["last-epoch top-1 [%]"], teacher["n"], teacher["images seen"]) == (
        "teacher (resnet8)", f"{scored:.2f}", "1", ""
    )  # fmt: skip
    assert [(row["method"], row["pair"], row["n"]) for row in rows] == [(m, "res20_res8", "2") for m in top1]
    for row in rows:
        a, b = top1[row["method"]]
        assert row["last-epoch top-1 [%]"] == f"{(a + b) / 2:.2f}"
        assert row["std"] == f"{abs(a - b) / 2**0.5:.2f}"
        assert row["images seen"] == "80"

    console = OUTPUT / "teacher" / "res8" / "seed0.log"
    assert printed.startswith(
        f"Tiny: 40 images, two epochs\n1 to run, 1 at a time; the .log files show the progress, {console} for example\n"
        "[1/1] teacher, res8, seed 0: "
    )
    assert all(f"] {method}, res20_res8, seed {seed}: " in printed for method, seed in CELLS)
    assert "One of 539 images is 0.19 points." in printed
    table = (OUTPUT / "table.md").read_text()
    assert table.startswith("# Tiny: 40 images, two epochs\n\n| method ")
    assert table.partition("\n\n")[2].strip() in printed
    assert (OUTPUT / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = ElementTree.parse(OUTPUT / "accuracies.svg")
    assert picture.getroot().tag.endswith("svg")
    for method, seed in CELLS:
        assert "[EVAL] Epoch 2/2" in folder_of(method, seed).with_name(f"seed{seed}.log").read_text()


def test_the_trained_teacher_is_the_students_teacher(printed):
    teacher = json.loads((OUTPUT / "teacher" / "res8" / "seed0" / "results.json").read_text())
    for seed in (0, 1):
        assert results_of("KD", seed)["teacher"]["top1"] == teacher["last"]["top1"]
    assert "teacher" not in results_of("plain")


def test_what_is_done_is_not_run_again(printed, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
    assert run_again() == ["1 of 1 runs are done already", "4 of 4 runs are done already"]


def test_a_changed_option_runs_those_cells_again(printed):
    methods = {"plain": PLAIN, "KD": KD | {"OPTIONS": KD["OPTIONS"] | {"KD.TEMPERATURE": 2}}}
    before = results_of("KD")["last"]
    assert ran(run_again(METHODS=methods)) == ["KD 0", "KD 1"]
    assert results_of("KD")["last"]["loss"] != before["loss"]
    assert run_again(METHODS=methods)[-1] == "4 of 4 runs are done already"


def test_runs_of_another_version_of_the_methods_file_are_named(printed):
    assert results_of("KD")["method_file"]["path"] == "mdistiller/distillers/KD.py"
    assert not any("another version" in line for line in run_again())
    set_results("KD", 1, method_file={"path": "elsewhere/KD.py", "sha256": "0" * 64})
    lines = run_again()
    (line,) = [line for line in lines if "another version" in line]
    assert line.startswith(
        f"made with another version of mdistiller/distillers/KD.py, and kept: {folder_of('KD', 1)}; "
    )
    assert ran(lines) == []


def test_a_further_seed_runs_alone(printed):
    assert ran(run_again(SEEDS=[0, 1, 2])) == ["KD 2", "plain 2"]


def test_another_teacher_makes_its_students_run_again(printed):
    """The path of the teacher's weights stays the same when it is trained anew; what it holds doesn't."""
    other = cifar_model_dict["resnet8"][0](num_classes=10)
    torch.save({"model": other.state_dict()}, OUTPUT / "teacher" / "res8" / "seed0" / "student_last")
    assert ran(run_again()) == ["KD 0", "KD 1"]


def test_a_run_from_before_a_key_existed_stays_done(printed):
    """A new version of the library with one more key must not cost hours."""
    path = folder_of("plain") / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["SOLVER"]["EMA_DECAY"], content["KD"]
    path.write_text(yaml.safe_dump(content))
    assert ran(run_again()) == []


def test_an_interrupted_cell_goes_on_and_ends_the_same(printed):
    folder = folder_of("KD", 1)
    before = (folder / "metrics.csv").read_text()
    shutil.copy(folder / "epoch_1", folder / "latest")
    set_results("KD", 1, status="running")
    assert ran(run_again()) == ["KD 1"]
    log = folder.with_name("seed1.log").read_text()
    assert log.count("Epoch 1/2") == 1
    assert log.count("Epoch 2/2") == 2
    assert (folder / "metrics.csv").read_text() == before


def test_sigterm_stops_the_runs_which_save_their_state(tmp_path):
    options = PLAN["OPTIONS"] | {"SOLVER.EPOCHS": 100_000, "LOG.SAVE_CHECKPOINT_FREQ": 0}
    plan = PLAN | {"METHODS": {"plain": PLAIN}, "PAIRS": {"res20_res8": {}}, "OPTIONS": options, "CLAIMS": []}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, ROOT / "tools" / "reproduce.py", "--plan", "plan.yaml", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / folder_of("plain", seed) for seed in (0, 1)]
    logs = [folder.with_name(f"{folder.name}.log") for folder in folders]
    while process.poll() is None and not all(log.is_file() and "Epoch 2/" in log.read_text() for log in logs):
        time.sleep(0.1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    noted = 2 * "SIGTERM: finishing the step and saving; a second signal ends at once\n"
    assert err == noted + "stopped; run the command again to continue\n"
    for folder, log in zip(folders, logs, strict=True):
        assert "stopped by SIGTERM; --resume continues from" in log.read_text()
        assert (folder / "latest").is_file()


def test_a_cell_without_a_checkpoint_starts_anew(printed):
    folder = folder_of("plain")
    before = (folder / "metrics.csv").read_text()
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    assert ran(run_again()) == ["plain 0"]
    assert (folder / "metrics.csv").read_text() == before


def test_a_start_that_was_killed_before_config_yaml_does_not_block_its_cell(printed):
    folder = folder_of("plain")
    before = (folder / "metrics.csv").read_text()
    shutil.rmtree(folder)
    folder.mkdir()
    for name in (".lock", ".config.yaml.abc.tmp"):
        (folder / name).touch()
    assert ran(run_again()) == ["plain 0"]
    assert (folder / "metrics.csv").read_text() == before


def test_an_output_that_cannot_be_written_is_found_before_a_process_starts(printed, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
    Path("file").touch()
    outcome = run_tool("reproduce", ["--plan", write_plan(OUTPUT="file/tiny")])
    assert (outcome.code, "cannot write to file/tiny: Not a directory" in outcome.err) == (2, True)


def test_a_failing_cell_is_reported_and_the_others_are_kept(printed):
    diverging = PLAIN | {"OPTIONS": PLAIN["OPTIONS"] | {"SOLVER.LR": 1e30}}
    impossible = PLAIN | {"OPTIONS": PLAIN["OPTIONS"] | {"DATASET.TRAIN_PER_CLASS": 500}}
    methods = {"diverging": diverging, "plain": PLAIN, "impossible": impossible, "KD": KD, "new": KD}
    outcome = run_tool("reproduce", ["--plan", write_plan(METHODS=methods, SEEDS=[0], CLAIMS=[]), "--jobs", 1])
    assert outcome.code == 1
    first, *reasons = outcome.err.splitlines()
    assert first == "stopped: some runs failed:"
    assert len(reasons) == 2
    assert "diverging, res20_res8, seed 0: the loss is not finite at step" in reasons[0]
    assert f"({folder_of('diverging')}.log)" in reasons[0]
    assert "DATASET.TRAIN_PER_CLASS=500, but the smallest class has 122" in reasons[1]
    assert "NonFiniteLossError" in folder_of("diverging").with_name("seed0.log").read_text()
    assert results_of("new")["status"] == "finished"
    assert ran(run_again(METHODS={"KD": KD, "new": KD}, SEEDS=[0], CLAIMS=[])) == []


def test_a_killed_process_is_reported_like_any_other_failure(printed, monkeypatch):
    class Killed(InThisProcess):
        def submit(self, function, argument):
            future = Future()
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
            return future

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Killed)
    with pytest.raises(RunError, match=r"KD, res20_res8, seed 2: a process was terminated abruptly"):
        run_again(SEEDS=[2])


@pytest.mark.parametrize(("jobs", "threads"), [(1, 6), (4, 1), (7, 1)])
def test_runs_side_by_side_share_the_threads_that_one_alone_would_take(printed, monkeypatch, jobs, threads):
    """More threads than cores wait for each other: a plan of one job beside others at work was ten times as slow."""
    pools = []

    class Noted(InThisProcess):
        def __init__(self, *arguments):
            pools.append(arguments)

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    cells = load_plan(write_plan(SEEDS=[0, 1, 2, 3, 4, 5, 6], METHODS={"plain": PLAIN}, CLAIMS=[])).cells()
    monkeypatch.setattr(runner, "_run_cell", lambda cell: (0.0, "", False))
    list(runner._in_processes(cells, jobs))
    assert [arguments[-1] for arguments in pools] == [(threads,)]


@pytest.mark.parametrize(
    ("top1", "code", "sentence"),
    [
        ({"KD": [90.0, 92.0], "plain": [80.0, 82.0]}, 0, "KD beats plain on res20_res8: +10.00 points"),
        ({"KD": [90.0, 92.0], "plain": [90.0, 92.0]}, 1, "KD does NOT beat plain on res20_res8: +0.00 points"),
    ],
)
def test_a_claim_decides_the_exit_code(printed, top1, code, sentence):
    for method, values in top1.items():
        for seed, value in enumerate(values):
            set_results(method, seed, last=results_of(method, seed)["last"] | {"top1": value})
    outcome = run_tool("reproduce", ["--plan", write_plan()])
    assert (outcome.code, outcome.err) == (code, "")
    assert sentence in outcome.out
    assert sentence in (OUTPUT / "table.md").read_text()


def test_without_matplotlib_there_are_still_tables(printed, monkeypatch):
    for name in ("table.md", "table.csv", "curves.png", "accuracies.svg"):
        (OUTPUT / name).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run_tool("reproduce", ["--plan", write_plan(CLAIMS=[])])
    assert outcome.code == 0
    assert "No curves.png: the learning curves need matplotlib: pip install matplotlib" in outcome.out
    assert {path.name for path in OUTPUT.iterdir() if path.is_file()} == {"table.md", "table.csv"}


def test_several_plans_make_one_page_that_says_where_it_was_measured(printed):
    Path("again.yaml").write_text(yaml.safe_dump(PLAN | {"TITLE": "Again", "METHODS": {"KD": KD}, "CLAIMS": []}))
    outcome = run_tool("reproduce", ["--plan", write_plan(CLAIMS=[]), "again.yaml", "--report", "docs/page.md"])
    assert (outcome.code, outcome.err) == (0, "")
    page = Path("docs/page.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Measured results", f"## {PLAN['TITLE']}", "## Again"
    ]  # fmt: skip
    assert "reproduce.py --plan plan.yaml again.yaml --report docs/page.md" in page
    assert len(re.findall(r"^\| KD +\| res20_res8 \|", page, re.MULTILINE)) == 2
    assert page.count("training [s]") == 2
    environment = json.loads((folder_of("KD") / "environment.json").read_text())
    assert page.count(f"Measured on {environment['started'][:10]}, on {environment['processor']}, ") == 2
    assert str(OUTPUT) not in page.replace("--report docs/page.md", "")  # nothing of the reader's machine


@pytest.mark.parametrize(
    ("key", "value"), [("threads", 64), ("git", "f" * 40), ("torch", "2.0.0"), ("device", "cuda:0")]
)
def test_seconds_of_several_machines_or_versions_are_not_shown(printed, key, value):
    environment = folder_of("KD", 1) / "environment.json"
    before = environment.read_text()
    environment.write_text(json.dumps(json.loads(before) | {key: value}))
    try:
        outcome = run_tool("reproduce", ["--plan", write_plan(CLAIMS=[])])
    finally:
        environment.write_text(before)
    assert outcome.code == 0 and "images seen" in outcome.out and "training [s]" not in outcome.out


def test_no_plan_runs_when_one_is_wrong(printed):
    outcome = run_tool("reproduce", ["--plan", write_plan(), "missing.yaml"])
    assert outcome.code == 2 and "no plan missing.yaml" in outcome.err
    assert outcome.out == ""
