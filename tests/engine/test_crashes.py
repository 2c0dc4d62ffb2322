"""Runs that are killed, stopped or damaged end as if nothing had happened, or say why they can't.

Belongs here: a run that is killed, stopped by a signal, resumed under other settings, or whose files are damaged.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import TINY, make_trainer, same_state, teacher_file, tiny_config

from mdistiller.engine import hooks
from mdistiller.engine.folder.checkpoint import CheckpointError, DiskFullError, load_checkpoint, save_checkpoint
from mdistiller.engine.folder.run_folder import alone_in
from mdistiller.engine.folder.writers import Events
from mdistiller.engine.run import run
from mdistiller.registry import InputError

DRIVER = Path(__file__).with_name("crash_driver.py")
# Both views of a method with augmentation; latest also within the epochs of 4 steps.
VALUES = {"DISTILLER.TYPE": "KD_TWO_VIEWS", "SOLVER.EPOCHS": 4, "LOG.SAVE_EVERY_STEPS": 3}
BF16 = {"SOLVER.AMP": "bf16", "SOLVER.CHANNELS_LAST": True}


def arguments(folder, teacher, values):
    merged = {**TINY, **VALUES, **values, "LOG.PREFIX": folder, "DISTILLER.TEACHER_CKPT": teacher}
    return [str(part) for item in merged.items() for part in item]


def train(moment, count, number, folder, teacher, values, *flags):
    """A training that is struck at the moment; see the driver."""
    command = [sys.executable, DRIVER, moment, str(count), number, *flags, *arguments(folder, teacher, values)]
    return subprocess.run(command, capture_output=True, text=True)


def deterministic_part(folder):
    """What a run leaves, without times and places."""
    run_folder = folder / "distill" / "default"
    latest = load_checkpoint(run_folder / "latest")
    latest["hooks"].pop("Clock")
    latest["results"].pop("seconds")
    latest.pop("config")
    results = json.loads((run_folder / "results.json").read_text())
    kept = {key: results[key] for key in ("last", "best", "mean_of_last", "images_seen", "steps", "status")}
    return {
        "latest": latest,
        "student": load_checkpoint(run_folder / "student_last"),
        "best": load_checkpoint(run_folder / "student_best"),
        "metrics": (run_folder / "metrics.csv").read_bytes(),
        "worklog": (run_folder / "worklog.txt").read_bytes(),
        "results": kept,
    }


def whole_run(folder, teacher, values):
    assert train("never", 1, "SIGTERM", folder, teacher, values).returncode == 0
    return deterministic_part(folder)


BLOWS = [
    ("step", 6, "SIGKILL", -signal.SIGKILL),
    ("evaluation", 2, "SIGKILL", -signal.SIGKILL),
    ("save", 7, "SIGKILL", -signal.SIGKILL),
    ("step", 2, "SIGTERM", 143),
    ("evaluation", 1, "SIGINT", 130),
]


@pytest.mark.parametrize("values", [{}, pytest.param(BF16, marks=pytest.mark.slow)], ids=["float32", "bf16"])
def test_killed_and_stopped_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, values):
    teacher = teacher_file(tmp_path)
    flags = []
    for moment, count, number, code in BLOWS:
        done = train(moment, count, number, tmp_path / "struck", teacher, values, *flags)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        flags = ["--resume"]
    assert train("never", 1, "SIGTERM", tmp_path / "struck", teacher, values, "--resume").returncode == 0
    expected = whole_run(tmp_path / "whole", teacher, values)
    found = deterministic_part(tmp_path / "struck")
    for part, value in expected.items():
        assert same_state(found[part], value), part


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, BF16], ids=["float32", "bf16"])
def test_ten_kills_at_random_moments(tmp_path, values):
    """Each strikes some time after the run has got a few epochs further, wherever it then is."""
    teacher, dice = teacher_file(tmp_path), random.Random(0)
    values = {**values, "SOLVER.EPOCHS": 100, "LOG.SAVE_EVERY_STEPS": 1}
    metrics = tmp_path / "struck" / "distill" / "default" / "metrics.csv"
    command, flags = [sys.executable, DRIVER, "never", "1", "SIGTERM"], []
    for epochs in range(5, 55, 5):
        process = subprocess.Popen(
            [*command, *flags, *arguments(tmp_path / "struck", teacher, values)], stdout=subprocess.DEVNULL
        )
        while not metrics.exists() or metrics.read_text().count("\n") <= epochs:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        flags = ["--resume"]
    assert train("never", 1, "SIGTERM", tmp_path / "struck", teacher, values, "--resume").returncode == 0
    expected = whole_run(tmp_path / "whole", teacher, values)
    found = deterministic_part(tmp_path / "struck")
    for part, value in expected.items():
        assert same_state(found[part], value), part


@pytest.mark.slow
def test_a_signal_to_the_whole_group_of_processes_spares_the_workers_until_the_state_is_saved(tmp_path):
    values = {"DATASET.NUM_WORKERS": 2, "SOLVER.EPOCHS": 2000}
    teacher = teacher_file(tmp_path)
    command = [sys.executable, DRIVER, "never", "1", "SIGTERM", *arguments(tmp_path / "run", teacher, values)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run" / "distill" / "default" / "latest").exists():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err and "--resume" in err


def test_the_second_signal_leaves_at_once(tmp_path, monkeypatch):
    stop = hooks.StopSignals(make_trainer(tmp_path), None)
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop._receive(signal.SIGTERM, None)
    assert not left
    stop._receive(signal.SIGINT, None)
    assert left == [130]


def test_handlers_of_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, SOLVER__EPOCHS=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def small_state():
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(40, 40, generator=generator) for i in range(4)}
    return {"epoch": 3, "model": weights, "optimizer": {"state": {0: {"buffer": torch.randn(40, 40)}}}, "step": 12}


def damaged(content, others, dice):
    """One random damage; positions are uniform over the file."""
    kind = dice.choice(["truncated", "flipped", "zeroed", "swapped", "appended"])
    data, at = bytearray(content), dice.randrange(len(content))
    if kind == "truncated":
        return kind, bytes(data[:at])
    if kind == "flipped":
        for _ in range(dice.choice([1, 1, 2, 8])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == "zeroed":
        end = min(len(data), at + dice.choice([1, 16, 512, 4096]))
        data[at:end] = bytes(end - at)
    elif kind == "appended":
        data += dice.randbytes(dice.choice([1, 100]))
    else:
        return kind, dice.choice(others)
    return kind, bytes(data)


def test_a_thousand_damages_are_refused_or_harmless(tmp_path):
    """A damage may hit bytes that carry nothing (padding); what loads must then be equal to what was saved."""
    path, state, dice = tmp_path / "latest", small_state(), random.Random(1)
    save_checkpoint(state, path)
    content = path.read_bytes()
    others = [b"", content[:100], dice.randbytes(5000), b"epoch,lr\n1,0.1\n", json.dumps({"epoch": 3}).encode()]
    refused, harmless = Counter(), Counter()
    for _ in range(1000):
        kind, data = damaged(content, others, dice)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused[kind] += 1
        else:
            assert same_state(loaded, state), kind
            harmless[kind] += 1
    assert sum(refused.values()) + sum(harmless.values()) == 1000
    assert not harmless["truncated"] and not harmless["swapped"]
    assert refused["flipped"] > 150 and refused["zeroed"] > 150


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another run", "a student's file", "deleted"])
def test_a_damaged_latest_gives_way_to_the_one_before(tmp_path, capsys, damage):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(tmp_path / "mine", SOLVER__EPOCHS=2).train()
    latest = tmp_path / "mine" / "distill" / "default" / "latest"
    if damage == "truncated":
        latest.write_bytes(latest.read_bytes()[:-1000])
    elif damage == "flipped":
        data = bytearray(latest.read_bytes())
        data[len(data) // 2] ^= 1
        latest.write_bytes(data)
    elif damage == "of another run":
        make_trainer(tmp_path / "other", EXPERIMENT__SEED=1, SOLVER__EPOCHS=1).train()
        shutil.copy(tmp_path / "other" / "distill" / "default" / "latest", latest)
    elif damage == "a student's file":
        shutil.copy(latest.with_name("student_latest"), latest)
    else:
        latest.unlink()
    resumed = make_trainer(tmp_path / "mine")
    resumed.train(resume=True)
    assert "WARNING" in capsys.readouterr().out
    assert same_state(dict(resumed.distiller.state_dict()), dict(whole.distiller.state_dict()))


def test_a_student_best_of_another_run_is_not_scored(tmp_path, capsys):
    other = make_trainer(tmp_path / "other", EXPERIMENT__SEED=1, SOLVER__EPOCHS=1)
    other.train()
    trainer = make_trainer(tmp_path / "mine", DATASET__VAL_FRACTION=0.2)
    trainer.train()
    shutil.copy(other.folder / "student_last", trainer.folder / "student_best")
    results = make_trainer(tmp_path / "mine", DATASET__VAL_FRACTION=0.2).train(resume=True)
    assert "student_best is not the student of epoch" in results["best"]["problem"]
    assert "WARNING: the best student is not scored" in capsys.readouterr().out
    assert results["best"]["split"] == "validation"
    assert results["last"]["split"] == "test"


def test_a_signal_while_the_best_network_is_scored_leaves_the_last_one_alone(tmp_path):
    values = {"DATASET__VAL_FRACTION": 0.2, "SOLVER__EMA_DECAY": 0.5}
    expected = make_trainer(tmp_path / "whole", **values).train()
    trainer = make_trainer(tmp_path / "struck", **values)
    stop = next(hook for hook in trainer.hooks if isinstance(hook, hooks.StopSignals))
    best_network = hooks.Evaluate._best_network

    def strike(self, epoch):
        stop.received = signal.SIGINT
        return best_network(self, epoch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(hooks.StopRequested):
        patch.setattr(hooks.Evaluate, "_best_network", strike)
        trainer.train()
    assert json.loads((trainer.folder / "results.json").read_text())["status"] == "stopped"
    resumed = make_trainer(tmp_path / "struck", **values).train(resume=True)
    for key in ("last", "best", "ema", "mean_of_last", "validation"):
        assert resumed[key] == expected[key], key
    assert resumed["mean_of_last"]["split"] == "validation"
    assert "stopped_by" not in resumed


def test_two_runs_never_share_a_folder(tmp_path):
    cfg = tiny_config(tmp_path, SOLVER__EPOCHS=1)
    with (
        alone_in(_made(tmp_path / "distill" / "default")),
        pytest.raises(InputError, match="another process is training in"),
    ):
        run(cfg)
    run(cfg)
    with pytest.raises(InputError, match="holds a run already"):
        run(cfg)
    assert not (tmp_path / "distill" / "default" / ".lock").exists()


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def test_a_trainer_in_python_does_not_write_over_a_run(tmp_path):
    make_trainer(tmp_path, SOLVER__EPOCHS=1).train()
    with pytest.raises(InputError, match="holds a run already"):
        make_trainer(tmp_path, SOLVER__EPOCHS=1).train()


def test_settings_of_the_optimiser_may_change_on_resume_and_then_count(tmp_path):
    make_trainer(tmp_path, SOLVER__EPOCHS=1).train()
    resumed = make_trainer(tmp_path, SOLVER__EPOCHS=2, SOLVER__WEIGHT_DECAY=0.125, SOLVER__MOMENTUM=0.5)
    resumed.train(resume=True)
    (group,) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.125, 0.5)


def test_settings_of_the_method_and_the_teachers_file_may_not_change_on_resume(tmp_path):
    values = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__EPOCHS": 1}
    run(tiny_config(tmp_path, **values))
    values["SOLVER__EPOCHS"] = 2
    with pytest.raises(InputError, match=r"KD\.TEMPERATURE was 4\.0, is 2\.0"):
        run(tiny_config(tmp_path, **values, KD__TEMPERATURE=2.0), resume=True)
    shutil.copy(tmp_path / "distill" / "default" / "student_last", values["DISTILLER__TEACHER_CKPT"])
    with pytest.raises(InputError, match="was run with another teacher"):
        run(tiny_config(tmp_path, **values), resume=True)


def test_fewer_epochs_than_are_begun_or_scored_are_refused_on_resume(tmp_path):
    run(tiny_config(tmp_path, SOLVER__EPOCHS=4, LOG__EVAL_FREQ=4, LOG__SAVE_CHECKPOINT_FREQ=3))
    folder = tmp_path / "distill" / "default"
    shutil.copy(folder / "epoch_3", folder / "latest")
    with pytest.raises(InputError, match=r"trained 3 epochs.*SOLVER\.EPOCHS is 3; give at least 4"):
        run(tiny_config(tmp_path, SOLVER__EPOCHS=3, LOG__EVAL_FREQ=4), resume=True)


def test_the_seconds_of_a_broken_off_epoch_count(tmp_path):
    trainer = make_trainer(tmp_path)
    clock = next(hook for hook in trainer.hooks if isinstance(hook, hooks.Clock))
    clock.before_epoch()
    time.sleep(0.02)
    assert clock.state_dict()["seconds"]["train"] >= 0.02
    clock.after_epoch()
    saved = clock.state_dict()["seconds"]["train"]
    time.sleep(0.02)
    assert clock.state_dict()["seconds"]["train"] == saved


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("name", ["metrics.csv", "worklog.txt", "events"])
def test_a_disk_that_is_full_when_logs_are_written_costs_nothing(tmp_path, monkeypatch, capsys, name, error):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    trainer = make_trainer(tmp_path / "struck", SOLVER__EPOCHS=3)
    closed = []
    monkeypatch.setattr(hooks.Console, "close", lambda hook: closed.append(hook))

    def refuse(*_, **__):
        if trainer.epoch == 2:
            raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        if name == "events":
            patch.setattr(Events, "flush", refuse)
        else:
            opened = Path.open
            patch.setattr(Path, "open", lambda path, *a, **k: (path.name == name and refuse()) or opened(path, *a, **k))
        with pytest.raises(DiskFullError, match=r"no space left to write .* Free space and continue with --resume"):
            trainer.train()
    assert closed and "WARNING" not in capsys.readouterr().out
    again = make_trainer(tmp_path / "struck")
    again.train(resume=True)
    assert same_state(dict(again.distiller.state_dict()), dict(whole.distiller.state_dict()))
    for log in ("metrics.csv", "worklog.txt"):
        assert (again.folder / log).read_bytes() == (whole.folder / log).read_bytes()


def test_all_hooks_are_closed_and_the_first_error_is_the_one_that_counts(tmp_path, capsys):
    class Closing(hooks.Hook):
        def after_epoch(self):
            raise RuntimeError("first")

        def close(self):
            raise ValueError("second")

    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=1)
    handlers = signal.getsignal(signal.SIGINT)
    hooks.add_hooks(trainer, [Closing])
    with pytest.raises(RuntimeError, match="first"):
        trainer.train()
    assert "WARNING: ValueError while the run was ending: second" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == handlers
    assert json.loads((trainer.folder / "results.json").read_text())["stopped_by"] == "RuntimeError: first"


def test_other_settings_of_latest_are_said(tmp_path, capsys):
    for rate in (0.05, 0.02):
        make_trainer(tmp_path / str(rate), SOLVER__EPOCHS=1, SOLVER__LR=rate).train()
    mine, other = (tmp_path / name / "distill" / "default" / "latest" for name in ("0.05", "0.02"))
    shutil.copy(other, mine)
    make_trainer(tmp_path / "0.05", SOLVER__EPOCHS=2).train(resume=True)
    assert "resuming although SOLVER.LR was 0.02, is 0.05" in capsys.readouterr().out


def test_the_rate_of_an_epochs_last_step_is_saved_also_if_a_stop_comes_behind_it(tmp_path, capsys):
    class Stop(hooks.Hook):
        def after_step(self, output):
            if self.trainer.step == 4:
                raise KeyboardInterrupt

    values = {"SOLVER__EPOCHS": 2, "SOLVER__LR_SCHEDULE": "cosine", "LOG__SAVE_EVERY_STEPS": 1}
    whole = make_trainer(tmp_path / "whole", **values)
    whole.train()
    stopped = make_trainer(tmp_path / "parts", **values)
    stopped.hooks.append(Stop(stopped))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path / "parts", **values)
    resumed.resume()
    assert "latest: 1 epoch is done" in capsys.readouterr().out
    groups = [trainer.optimizer.state_dict()["param_groups"] for trainer in (resumed, stopped)]
    assert groups[0] == groups[1]
    assert groups[0][0]["lr"] < 0.05


def test_overwriting_spares_what_is_not_the_runs(tmp_path):
    run(tiny_config(tmp_path, SOLVER__EPOCHS=1))
    notes = tmp_path / "distill" / "default" / "notes.txt"
    notes.write_text("mine")
    run(tiny_config(tmp_path, SOLVER__EPOCHS=1), overwrite=True)
    assert notes.read_text() == "mine"


def test_where_a_run_was_before_a_resume_is_kept(tmp_path):
    for epochs, resume in ((1, False), (2, True), (3, True)):
        run(tiny_config(tmp_path, SOLVER__EPOCHS=epochs), resume=resume)
    environment = json.loads((tmp_path / "distill" / "default" / "environment.json").read_text())
    assert len(environment["earlier"]) == 2


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    run(tiny_config(tmp_path, SOLVER__EPOCHS=1))
    leftover = tmp_path / "distill" / "default" / ".latest.abc.tmp"
    leftover.write_bytes(b"half")
    run(tiny_config(tmp_path, SOLVER__EPOCHS=1), resume=True)
    assert not leftover.exists()


def test_nothing_to_fall_back_on_is_said_for_both_files(tmp_path):
    make_trainer(tmp_path, SOLVER__EPOCHS=2).train()
    folder = tmp_path / "distill" / "default"
    for name in ("latest", "latest_previous"):
        (folder / name).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"latest is damaged .*; and .*latest_previous is damaged"):
        make_trainer(tmp_path).train(resume=True)


def test_other_workers_and_more_epochs_are_fine_and_said(tmp_path, capsys):
    run(tiny_config(tmp_path, SOLVER__EPOCHS=1))
    results = run(tiny_config(tmp_path, SOLVER__EPOCHS=2, DATASET__NUM_WORKERS=1), resume=True)
    out = capsys.readouterr().out
    assert "resuming although SOLVER.EPOCHS was 1, is 2" in out
    assert "resuming although DATASET.NUM_WORKERS was 0, is 1" in out
    assert results["last"]["epoch"] == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_keeps_the_old_checkpoint_and_says_how_much_is_missing(small_disk):
    values = {"SOLVER__EPOCHS": 2, "LOG__SAVE_CHECKPOINT_FREQ": 0}
    make_trainer(small_disk, **values).train()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    trainer = make_trainer(small_disk, **{**values, "SOLVER__EPOCHS": 3})
    with pytest.raises(DiskFullError, match=r"MB are missing; the .* intact"):
        trainer.train(resume=True)
    assert load_checkpoint(trainer.folder / "latest")["epoch"] == 2
    filler.unlink()
    make_trainer(small_disk, **{**values, "SOLVER__EPOCHS": 3}).train(resume=True)
