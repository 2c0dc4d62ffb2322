"""``python -m mdistiller`` from any folder, and the package that is installed.

Belongs here: where commands and configurations are found, and how texts name the commands.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import ROOT, run_module, run_tool

from mdistiller.commands import NAMES
from mdistiller.engine.cfg import load_config
from mdistiller.engine.config.node import CONFIGS, config_path
from mdistiller.messages import as_typed

TINY = ["DATASET.TRAIN_PER_CLASS", 4, "SOLVER.EPOCHS", 1, "LOG.EVAL_FREQ", 1, "SOLVER.DEVICE", "cpu"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_of_the_library_trains_from_an_empty_folder():
    outcome = run_module("train", ["--cfg", "configs/digits/vanilla/res8.yaml", *TINY, "EXPERIMENT.NAME", "a"])
    assert outcome.code == 0, outcome
    folder = Path("output/digits/a")
    command = json.loads((folder / "environment.json").read_text())["command"]
    assert command.startswith("python -m mdistiller train --cfg configs/digits/vanilla/res8.yaml ")
    scored = run_module("eval", ["-m", "resnet8", "-c", folder / "student_last", "-d", "digits"])
    assert "on 539 test images of digits" in scored.out


def test_a_plan_of_the_library_finds_its_configs_from_an_empty_folder(monkeypatch):
    seen = []
    monkeypatch.setattr("mdistiller.commands.reproduce.run_plan", lambda plan, jobs: seen.append(plan) or sys.exit(3))
    assert run_module("reproduce", ["--plan", "configs/plans/demo.yaml"]).code == 3
    assert len(seen[0].cells()) == 15


def test_the_current_folder_comes_first(empty_folder):
    name = Path("configs/digits/vanilla/res8.yaml")
    assert config_path(name) == CONFIGS / "digits" / "vanilla" / "res8.yaml"
    assert config_path(Path("configs/digits/no.yaml")) == CONFIGS / "digits" / "no.yaml"  # its neighbours are named
    assert config_path(Path("configs/no/no.yaml")) == Path("configs/no/no.yaml")
    assert config_path(Path("other/digits/vanilla/res8.yaml")) == Path("other/digits/vanilla/res8.yaml")
    assert config_path(Path("configs/../setup.py")) == Path("configs/../setup.py")
    name.parent.mkdir(parents=True)
    name.write_text("_BASE_: ../_base_.yaml\nSOLVER: {LR: 0.5}\n")  # its base is the library's
    cfg = load_config(name)
    assert (cfg.SOLVER.LR, cfg.DATASET.TYPE) == (0.5, "digits")


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_command_as_it_is_typed(name):
    for run, typed, other in (
        (run_module, f"python -m mdistiller {name}", "tools/"),
        (run_tool, f"python tools/{name}.py", "-m mdistiller"),
    ):
        outcome = run(name, ["--help"])
        assert outcome.code == 0
        assert outcome.out.startswith(f"usage: {typed} ")
        assert outcome.out.count(typed) > 1 and other not in outcome.out


def test_messages_name_the_command_as_it_is_typed():
    arguments = ["--cfg", "configs/digits/kd/res20_res8.yaml"]
    recipe = "--cfg configs/digits/vanilla/res20.yaml"
    assert f"train it: python -m mdistiller train {recipe}" in run_module("train", arguments).err
    assert f"train it: python tools/train.py {recipe}" in run_tool("train", arguments).err


def test_texts_of_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr("mdistiller.messages.TOOLS", tmp_path / "tools")
    assert as_typed("see tools/list.py") == "see python -m mdistiller list"
    assert as_typed("sh download_ckpts.sh cifar_teachers") == "python -m mdistiller.hub cifar_teachers"
    line = "torchrun --nproc_per_node 2 tools/train.py --cfg FILE"
    assert as_typed(line) == "torchrun --nproc_per_node 2 -m mdistiller train --cfg FILE"


def test_an_overview_and_a_wrong_name():
    for arguments in (["--help"], ["-h"]):
        out = run_module(*arguments, []).out
        assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == NAMES
    outcome = run_module("trian", [])
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: no command named 'trian'; closest: train")


def test_each_script_is_a_command():
    assert sorted(path.stem for path in (ROOT / "tools").glob("*.py")) == NAMES


def test_every_config_is_part_of_the_package(monkeypatch):
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: given.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    assert "mdistiller.configs" in given["packages"] and "mdistiller.commands" in given["packages"]
    folder = ROOT / given["package_dir"]["mdistiller.configs"]
    packed = {path for pattern in given["package_data"]["mdistiller.configs"] for path in folder.glob(pattern)}
    assert packed == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_wheel_trains_from_an_empty_folder(tmp_path):
    pytest.importorskip("setuptools")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "requirements.txt", "mdistiller", "configs"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", tmp_path / "site", wheel], check=True)
    place = tmp_path / "empty"
    place.mkdir()

    def run(*arguments):
        command = [sys.executable, "-m", "mdistiller", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)

    done = run("train", "--cfg", "configs/digits/vanilla/res8.yaml", *TINY)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "output" / "digits" / "vanilla,res8" / "student_last").is_file()
    assert "configs/cifar100/vrm/res32x4_res8x4.yaml" in run("list", "configs").stdout
    refused = run("train", "--cfg", "configs/cifar100/kd/res56_res20.yaml").stderr
    assert "get it: python -m mdistiller.hub cifar_teachers" in refused
