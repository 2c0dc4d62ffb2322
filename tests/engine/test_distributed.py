"""Two processes against one: what they compute, leave and say.

Belongs here: a run, or a part of one, that needs more than one process.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.multiprocessing as mp
from cli_runner import ROOT, run_tool
from method_cases import METHODS, build, config
from processes import PER_IMAGE, PREPARED, RUN, SIZES, WORLD
from runs import TINY, teacher_file, tiny_config

from mdistiller.engine.build import build_distiller
from mdistiller.engine.folder.checkpoint import load_checkpoint
from mdistiller.engine.processes import distributed
from mdistiller.engine.processes.parallel import Parallel, shares
from mdistiller.engine.run import run

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where two processes have done all their tasks."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(processes.main, (str(folder),), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def found(place):
    return [torch.load(place / str(rank), weights_only=False) for rank in range(WORLD)]


def of_task(found, name):
    results = [result[name] for result in found]
    for result in results:
        assert not isinstance(result, str), result
    return results


def test_decisions(found):
    both = of_task(found, "decisions")
    for result in both:
        assert result["poll"] == [0, 5, 0]  # one call late
        assert (result["highest"], result["total"].item()) == (1, 3.0)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["first"] == "of 0"
        assert result["fine"] is None
    assert [r["error of 0"] for r in both] == [("InputError", "no such file", told) for told in (False, True)]
    assert [r["error of 1"] for r in both] == [("InputError", "mine", told) for told in (True, False)]
    assert both[0]["stubborn"][:2] == ("RuntimeError", "Stubborn: a b")
    assert both[1]["stubborn"][:2] == ("Stubborn", "a b")
    assert both[1]["began"][0] >= both[0]["one by machine"][1]


def test_rows_of_unequally_many_images(found):
    both = of_task(found, "rows")
    whole = torch.arange(10.0).view(5, 2)
    for result, count, begin in zip(both, (3, 2), (0, 3), strict=True):
        assert torch.equal(result["whole"], whole)
        assert torch.equal(result["gradient"], 3 * whole[begin : begin + count] ** 2)  # (1 + 2) * factors
        assert result["twice"] == 10
        assert result["layout"]
    assert both[0]["wrong"][0] == "ValueError"


def test_batch_norm_over_processes_is_that_of_the_whole_batch(found):
    both = [result["norm"] for result in of_task(found, "rows")]
    norm, image, factors = processes.norm_case()
    image.requires_grad_()
    output = norm(image)
    (output * factors).sum().backward()
    for name, expected in (("output", output.detach()), ("image", image.grad)):
        torch.testing.assert_close(torch.cat([result[name] for result in both]), expected, **CLOSE)
    for result in both:
        torch.testing.assert_close(result["gradient"], norm.weight.grad, **CLOSE)
        for name, expected in norm.state_dict().items():
            torch.testing.assert_close(result[name], expected, **CLOSE)


def test_gradients_that_a_process_lacks_count_as_zero(found):
    for result in of_task(found, "rows"):
        lacking, (first, second, third) = result["average"]
        assert lacking and third is None
        assert first.tolist() == [1.5, 1.5] and second.tolist() == [2.0, 2.0, 2.0]


def losses_of(result):
    assert not isinstance(result["losses"], str), result["losses"]
    return result["losses"]


@pytest.mark.parametrize("method", METHODS)
def test_processes_train_the_same_weights(found, method):
    first, second = (result["methods"][method] for result in of_task(found, "training"))
    for losses in losses_of(first) + losses_of(second):
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert first["digest"] == second["digest"]


def assert_as_one_process(results, method, share_of_losses):
    """Weights and the mean of the losses are those of one process with the whole batches."""
    history, state = processes.alone(method)
    for step, losses in enumerate(history):
        for name, loss in losses.items():
            both = [losses_of(result)[step][name] for result in results]
            mean = sum(weight * value for weight, value in zip(share_of_losses(SIZES[step]), both, strict=True))
            torch.testing.assert_close(mean, loss, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for result in results:
        for name, value in state.items():
            torch.testing.assert_close(
                result["state"][name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("method", PER_IMAGE)
def test_losses_per_image_are_those_of_one_process(found, method):
    results = [result["per image"][method] for result in of_task(found, "training")]
    assert_as_one_process(results, method, lambda size: [count / size for count in shares(size, WORLD)])


@pytest.mark.parametrize("method", METHODS)
def test_gathered_every_method_computes_what_it_does_in_one_process(found, method):
    results = [result["methods"][method] for result in of_task(found, "gathering")]
    for each in ([1, 0], [0, 1]):
        assert_as_one_process(results, method, lambda size, each=each: each)


def test_gathered_kd_beside_a_method_with_a_folded_teacher(found):
    distiller = build_distiller(config("KD", {"DISTILLER.ADD_KD": 0.5}), *processes.networks("KD")).double().train()
    history = processes.train(distiller, "KD", dtype=torch.float64)
    for result in of_task(found, "gathering"):
        assert result["added"]["folded"] == (len(SIZES), True)
        for losses, expected in zip(losses_of(result["added"]), history, strict=True):
            torch.testing.assert_close(losses, expected, **CLOSE)


def test_gathered_with_a_compiled_student(found):
    results = [result["compiled"] for result in of_task(found, "gathering")]
    assert_as_one_process(results, "KD", lambda size: [1, 0])


def test_terms_may_come_and_go(found):
    first, second = (result["fickle"] for result in of_task(found, "training"))
    assert not isinstance(first["losses"], str), first["losses"]
    assert list(first["losses"][0]) == ["ce", "sometimes"] and list(second["losses"][-1]) == ["ce", "late"]
    assert first["digest"] == second["digest"]
    for result in of_task(found, "training"):
        assert result["searches"] == {"KD": False, "fickle": True}


def test_what_a_method_keeps_differently_is_named(found):
    first, second = (result["fickle"]["warned"] for result in of_task(found, "training"))
    assert "have different values of seen" in first and not second


def test_dot_with_its_two_backward_passes(place, found):
    expected = processes.trainer_of(processes.DOT, place / "one")
    expected.train()
    for result in of_task(found, "trainers"):
        for name, value in expected.distiller.student.state_dict().items():
            torch.testing.assert_close(result["dot"][name], value, rtol=1e-3, atol=1e-4)


def test_a_trainer_that_forgets_to_average_is_told(found):
    for result in of_task(found, "trainers"):
        assert "must call self.parallel.after_backward()" in result["forgetful"][1]


def rows_of(path):
    return list(csv.DictReader(path.open()))


def assert_same_metrics(path, other):
    mine, expected = rows_of(path), rows_of(other)
    assert len(mine) == len(expected)
    for row, other_row in zip(mine, expected, strict=True):
        assert row.keys() == other_row.keys()
        for name, value in row.items():
            assert float(value or 0) == pytest.approx(float(other_row[name] or 0), rel=1e-3), name


def test_a_run_of_two_then_one_then_two_processes_is_that_of_one(place, found, tmp_path):
    of_task(found, "runs")
    values = {**RUN, "DISTILLER__TEACHER_CKPT": str(place / "resnet8_10")}
    expected = run(tiny_config(tmp_path, **values))
    folder = place / "run" / "distill" / "default"
    assert_same_metrics(folder / "metrics.csv", tmp_path / "distill" / "default" / "metrics.csv")
    results = json.loads((folder / "results.json").read_text())
    for key in ("last", "best", "ema"):
        assert results[key]["top1"] == pytest.approx(expected[key]["top1"], abs=0.4)  # two of 539 images
        assert results[key]["images"] == expected[key]["images"]
    assert results["images_seen"] == expected["images_seen"]
    state = load_checkpoint(folder / "latest")
    assert not [name for name in state["model"] if name.startswith("module.")]
    assert (state["epoch"], len(state["random_of_others"])) == (3, 1)
    earlier = [entry["processes"] for entry in json.loads((folder / "environment.json").read_text())["earlier"]]
    assert earlier == [2, 1]


def test_both_processes_know_the_results(found):
    first, second = ([result[name] for name in ("together",)] for result in found)
    for mine, other in zip(first, second, strict=True):
        for key in ("last", "best", "ema", "validation", "images_seen"):
            assert mine[key] == other[key], key


def test_a_stage_before_the_training_is_that_of_one_process(place, found, tmp_path):
    first, second = (result["prepared"] for result in of_task(found, "runs"))
    expected = run(tiny_config(tmp_path, **PREPARED, DISTILLER__TEACHER_CKPT=str(place / "resnet8_10")))
    for result in (first, second):
        assert result["results"]["preparation"]["smp"] == pytest.approx(expected["preparation"]["smp"])
        assert result["again"]
    (mine,), (other,) = (list((folder / "prepared").glob("MDR*")) for folder in (place / "prepared", tmp_path))
    assert mine.name == other.name  # other settings would have another name
    assert_same_metrics(*(folder / "distill" / "default" / "metrics.csv" for folder in (place / "prepared", tmp_path)))


def test_the_whole_method_is_scored_where_processes_differ_in_a_buffer(found):
    """The first process alone compares the file with what was best; else one process would wait for the other."""
    first, second = (result["headed"] for result in of_task(found, "runs"))
    scores = [{name: result[key][name] for name in ("top1", "top5", "loss")} for result in (first, second)
              for key in ("best", "last")]  # fmt: skip
    assert scores[1:] == scores[:-1]
    assert "problem" not in first["best"]


def test_test_batches_in_turn(found):
    for result in of_task(found, "runs"):
        assert result["batches of test"] == 1  # of two: 300 and 239 images


def test_what_is_refused(found):
    both = of_task(found, "runs")
    for result in both:
        assert "must be a multiple of the number of processes, 2" in result["odd batch"][1]
        assert "holds 2 images" in result["tiny batch"][1] and "too few for 2 processes" in result["tiny batch"][1]
        assert "holds a run already" in result["held"][1]
        assert "not divided among them" in result["loader"][1]
    assert [result["held"][2] for result in both] == [False, True]


def test_a_signal_to_one_process_stops_all_after_the_same_step(place, found):
    both = of_task(found, "signals")
    for result in both:
        assert result["error"][0] == "StopRequested"
        assert result["step"] == 3  # heard of one step later
    assert load_checkpoint(place / "signal" / "distill" / "default" / "latest")["step"] == 3


def test_what_goes_wrong_in_one_process_stops_all(found):
    both = of_task(found, "stops")
    for result in both:
        assert result["not finite"][0] == "NonFiniteLossError" and result["step"] == 3
        assert result["full"][:2] == ("DiskFullError", "no space left")


def test_one_process_needs_no_others():
    assert (distributed.rank(), distributed.world_size(), distributed.is_first_process()) == (0, 1, True)
    distributed.start()
    assert distributed.world_size() == 1
    poll = distributed.DelayedMax()
    assert [poll(3), distributed.highest(2), distributed.on_first_process(lambda: 5)] == [3, 2, 5]
    with pytest.raises(KeyError, match="mine"), distributed.same_error():
        raise KeyError("mine")
    distiller = build("KD")
    assert Parallel(distiller, True, "sync").wrapper is None


@pytest.mark.parametrize(("images", "expected"), [(8, [3, 3, 2]), (3, [1, 1, 1]), (2, [1, 1, 0])])
def test_shares(images, expected):
    assert shares(images, 3) == expected


# The command


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def arguments(folder, **values):
    given = {key.replace("__", "."): value for key, value in values.items()}
    merged = {**TINY, "LOG.PREFIX": folder, **given}
    return [str(part) for item in merged.items() for part in item]


def torchrun(script, *args):
    return [*TORCHRUN, str(script), *map(str, args)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_command_under_torchrun(tmp_path):
    """Workers that make the batches, two views, and a loss that relates images, in two processes and in one."""
    values = {"DISTILLER__TYPE": "VRM", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__EPOCHS": 2,
              "SOLVER__GATHER": True, "SOLVER__BATCH_NORM": "sync", "SOLVER__LR": 0.01,
              "DATASET__NUM_WORKERS": 1}  # fmt: skip
    command = torchrun(ROOT / "tools" / "train.py", *arguments(tmp_path / "two", **values))
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CONFIG") == done.stdout.count("Epoch 2/2") == 1
    assert run_tool("train", arguments(tmp_path / "one", **values)).code == 0
    folders = [tmp_path / name / "distill" / "default" for name in ("two", "one")]
    assert_same_metrics(*(folder / "metrics.csv" for folder in folders))
    states = [load_checkpoint(folder / "student_last")["model"] for folder in folders]
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-2, atol=1e-3)
    assert json.loads((folders[0] / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    for values, message in (({"SOLVER__BATCH_SIZE": 9}, "multiple of"), ({"SOLVER__BATCH_NORM": "no"}, "BATCH_NORM")):
        command = torchrun(ROOT / "tools" / "train.py", *arguments(tmp_path, **values))
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode
        assert done.stderr.count("error: SOLVER") == 1 and message in done.stderr
        assert "exitcode: 2" in done.stderr or "exitcode  : 2" in done.stderr


def start_endless(folder):
    """A run that would not end for a long while, once it has begun, and its processes' numbers by rank."""
    driver = Path(__file__).with_name("crash_driver.py")
    values = {"SOLVER__EPOCHS": 5000, "SOLVER__LR_DECAY_STAGES": [], "LOG__SAVE_CHECKPOINT_FREQ": 0}
    process = subprocess.Popen(
        torchrun(driver, "never", 1, "SIGTERM", *arguments(folder, **values)),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    run_folder = folder / "distill" / "default"
    while not (run_folder / "latest").exists():
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    by_rank = {}
    for number in map(int, children.stdout.split()):
        entries = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in entries if entry.startswith(b"RANK=")]
        if ranks:
            by_rank[int(ranks[0][5:])] = number
    return process, by_rank, run_folder


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks processes up in /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job(tmp_path, rank):
    process, by_rank, _ = start_endless(tmp_path)
    os.kill(by_rank[rank], signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert not Path(f"/proc/{by_rank[1 - rank]}").exists()


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("to", ["the group", "torchrun", "a process"])
def test_sigterm_saves_once_and_the_run_can_go_on(tmp_path, to):
    process, by_rank, folder = start_endless(tmp_path)
    if to == "the group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid if to == "torchrun" else by_rank[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("--resume continues from") == 1
    if to == "a process":  # else torchrun reports the signal
        assert "exitcode: 143" in err
    state = load_checkpoint(folder / "latest")
    assert json.loads((folder / "results.json").read_text())["status"] == "stopped"
    values = {"SOLVER__EPOCHS": state["epoch"] + 2, "SOLVER__LR_DECAY_STAGES": [], "LOG__SAVE_CHECKPOINT_FREQ": 0}
    assert run_tool("train", [*arguments(tmp_path, **values), "--resume"]).code == 0
