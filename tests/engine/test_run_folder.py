"""A run's folder: what may be started in it, what its files say of changed settings, and a folder that gets lost.

Belongs here: what the folder's files decide, without the loop's numbers.
"""

from __future__ import annotations

import csv
import json

import pytest
from cli_runner import run_tool
from runs import TINY, tiny_config

from mdistiller.engine.folder.checkpoint import SaveError, remove_leftovers
from mdistiller.engine.folder.run_folder import alone_in, check_folder, keep_changes, write_environment
from mdistiller.engine.hooks import Hook
from mdistiller.engine.run import run
from mdistiller.registry import InputError
from mdistiller.reports import runner
from mdistiller.reports.plan import Cell

ONE = {"SOLVER__EPOCHS": 1, "DATASET__TRAIN_PER_CLASS": 1}


class Failing(Hook):
    """Fails after the first step, as a method under work does."""

    def after_step(self, output):
        raise RuntimeError("not yet")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "distill" / "default"
    folder.mkdir(parents=True)
    return folder


def options(folder, **values):
    merged = {**TINY, "LOG.PREFIX": folder, **{key.replace("__", "."): value for key, value in values.items()}}
    return [part for item in merged.items() for part in item]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_a_start_that_was_killed_before_config_yaml_blocks_nothing(tmp_path, folder, flags):
    for name in (".lock", ".writable", ".config.yaml.x1.tmp"):
        (folder / name).touch()
    given = {"resume": False, "overwrite": False} | flags
    assert check_folder(folder, tiny_config(tmp_path), **given) is False
    (folder / "notes.txt").touch()
    with pytest.raises(InputError, match=r"is no run's folder"):
        check_folder(folder, tiny_config(tmp_path), **given)


def test_a_run_that_failed_in_its_first_step_gives_way_to_the_next_one(tmp_path, folder):
    with pytest.raises(RuntimeError, match="not yet"):
        run(tiny_config(tmp_path, **ONE, SOLVER__LR=0.5), hooks=[Failing])
    assert json.loads((folder / "results.json").read_text())["status"] == "stopped"
    assert run(tiny_config(tmp_path, **ONE))["status"] == "finished"
    assert len(list((folder / "train.events").glob("events*"))) == 1
    with pytest.raises(InputError, match="holds a run already"):
        run(tiny_config(tmp_path, **ONE))


@pytest.mark.parametrize(
    "name", ["latest", "latest_previous", "best", "student_last", "epoch_3", "results.json", "metrics.csv",
             "worklog.txt", "environment.json", "changes.csv", "classes.json", "train.events"],
)  # fmt: skip
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_what_is_in_the_way_of_a_runs_files_is_named(tmp_path, folder, name, flags):
    (folder / "config.yaml").write_text(tiny_config(tmp_path).dump())
    if name == "train.events":
        (folder / name).touch()
    else:
        (folder / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is in the way"):
        check_folder(folder, tiny_config(tmp_path), **{"resume": False, "overwrite": False} | flags)


def test_a_folder_that_is_named_like_a_leftover_stays(folder):
    (folder / ".x.tmp").mkdir()
    (folder / ".latest.1.tmp").touch()
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == [".x.tmp"]


@pytest.mark.parametrize("content", ["[]", "3", '{"earlier": 3}', "{"])
def test_an_environment_that_says_something_else_is_written_anew(folder, capsys, content):
    path = folder / "environment.json"
    path.write_text(content)
    write_environment(path, {"host": "here"}, resumed=True)
    assert json.loads(path.read_text()) == {"host": "here", "earlier": []}
    assert "earlier environments are lost" in capsys.readouterr().out


class Renaming(Hook):
    """Somebody tidies up while the run goes on."""

    def after_step(self, output):
        if self.trainer.step == 1:
            self.trainer.folder.rename(self.trainer.folder.with_name("elsewhere"))


def test_a_folder_that_is_renamed_meanwhile_gives_one_message(tmp_path, folder, capsys):
    with pytest.raises(SaveError, match=r"metrics\.csv: its folder was deleted or renamed during the run"):
        run(tiny_config(tmp_path, **ONE), hooks=[Renaming])
    assert "WARNING" not in capsys.readouterr().out


def test_a_folder_where_the_lock_should_be_gives_a_message(folder):
    (folder / ".lock").mkdir()
    with pytest.raises(InputError, match="cannot write to"), alone_in(folder):
        pass


def changes_of(folder):
    with (folder / "changes.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_settings_that_change_on_resume_are_kept_and_named(tmp_path, folder):
    run(tiny_config(tmp_path, **ONE))
    longer = {**ONE, "SOLVER__EPOCHS": 2, "SOLVER__WEIGHT_DECAY": 0.125, "DATASET__TEST__BATCH_SIZE": 50}
    results = run(tiny_config(tmp_path, **longer), resume=True)
    assert (folder / "changes.csv").read_text().splitlines()[0] == "epoch,key,old,new"
    expected = [
        ("2", "DATASET.TEST.BATCH_SIZE", "300", "50"), ("2", "SOLVER.EPOCHS", "1", "2"),
        ("2", "SOLVER.WEIGHT_DECAY", "0.0001", "0.125"),
    ]  # fmt: skip
    assert sorted(changes_of(folder)) == expected
    assert sorted(results["changed_settings"]) == ["SOLVER.EPOCHS", "SOLVER.WEIGHT_DECAY"]
    assert json.loads((folder / "results.json").read_text())["changed_settings"] == results["changed_settings"]
    # A plan that asks for these settings wants them from the first epoch on.
    assert not runner._same_run(Cell("plain", "pair", 0, tiny_config(tmp_path, **longer)))
    run(tiny_config(tmp_path, **ONE), overwrite=True)
    assert not (folder / "changes.csv").exists()
    assert runner._same_run(Cell("plain", "pair", 0, tiny_config(tmp_path, **ONE)))


def test_a_change_is_kept_once_even_if_a_kill_comes_before_config_yaml(tmp_path, folder):
    (folder / "config.yaml").write_text(tiny_config(tmp_path).dump())
    for rate in (0.5, 0.5, 0.25):
        keep_changes(folder, tiny_config(tmp_path, SOLVER__LR=rate), 3)
    assert changes_of(folder) == [("3", "SOLVER.LR", "0.05", "0.5"), ("3", "SOLVER.LR", "0.05", "0.25")]


def test_a_finished_run_keeps_its_settings(tmp_path, folder):
    run(tiny_config(tmp_path, **ONE))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}
    outcome = run_tool("train", ["--resume", *options(tmp_path, **ONE, SOLVER__LR=0.1)])
    assert outcome.code == 0, outcome.err
    assert "nothing is trained; without effect: SOLVER.LR was 0.05, is 0.1" in outcome.out
    for name in ("config.yaml", "environment.json", "student_last", "latest"):
        path = folder / name
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before[name], name
    assert (folder / "results.json").read_bytes() == before["results.json"][0]
    assert not (folder / "changes.csv").exists()


def test_a_folder_that_is_taken_is_named_before_the_configuration_is_printed(tmp_path, folder):
    run(tiny_config(tmp_path, **ONE))
    outcome = run_tool("train", options(tmp_path, **ONE))
    assert outcome.code == 2 and "CONFIG" not in outcome.out
    assert "holds a run already" in outcome.err
