"""Method files of other projects run unmodified: search, loading, configuration, training, and messages of failures."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from cli_runner import run_tool
from engine.runs import TINY, make_trainer, teacher_file, tiny_config
from plugin_files import (
    CUDA_IN_CONSTRUCTOR,
    CUDA_IN_STEP,
    FEATURE,
    FEATURE_SETTINGS,
    FORKS_METHOD,
    MEMORY,
    SMOOTHING,
    TWO_VIEWS,
    WITH_DEFAULTS,
    forgotten,
    write,
    write_fork,
)
from yacs.config import CfgNode

from mdistiller import plugins
from mdistiller.contract import contract_of
from mdistiller.distillers import Distiller
from mdistiller.engine.build import build_distiller, build_student
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.engine.config.experiment import flatten
from mdistiller.engine.run import build_run
from mdistiller.files import file_sha256
from mdistiller.plugins import load_method_file
from mdistiller.registry import InputError, UnknownName, distiller_dict
from mdistiller.reports import load_plan


@pytest.fixture(autouse=True)
def clean_slate():
    with forgotten():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Replaces ``mdistiller/distillers/``, into which users put files."""
    monkeypatch.setattr(plugins, "FOLDER", tmp_path / "dropped")
    (tmp_path / "dropped").mkdir()
    return tmp_path / "dropped"


def config_file(tmp_path, tree, **values):
    """A YAML file: a tiny run with a teacher, and ``tree``."""
    whole = {}
    options = {**TINY, "DISTILLER.TEACHER_CKPT": teacher_file(tmp_path), "LOG.PREFIX": str(tmp_path / "output")}
    for key, value in (options | values).items():
        section = whole
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    for section, content in tree.items():
        whole[section] = {**whole.get(section, {}), **content} if isinstance(content, dict) else content
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def train(path, *options):
    return run_tool("train", ["--cfg", path, "--allow-plugins", *options])


# Found and registered


def test_a_file_is_registered_under_class_name_file_name_and_capitals(tmp_path):
    file = load_method_file(write(tmp_path, "hints", FEATURE))
    assert set(file.methods) == {"HintPlus", "HINTPLUS", "hints", "HINTS"}
    assert all(distiller_dict[name] is file.methods["HintPlus"] for name in file.methods)
    assert file.methods["HintPlus"].__module__ == "mdistiller.distillers.hints"
    assert load_method_file(tmp_path / "hints.py") is file  # not executed again


def test_names_that_a_file_registers_itself(tmp_path):
    text = """
        from mdistiller.distillers import Distiller, distiller_dict, register_distiller

        @register_distiller("BY-DECORATOR", {"WEIGHT": 1.0})
        class One(Distiller): ...

        class Two(Distiller): ...
        distiller_dict["BY-ASSIGNMENT"] = Two
    """
    names = set(load_method_file(write(tmp_path, "several", text)).methods)
    assert names == {"BY-DECORATOR", "BY-ASSIGNMENT", "One", "ONE", "Two", "TWO"}
    assert load_config(options=["BY-DECORATOR.WEIGHT", "2"])["BY-DECORATOR"].WEIGHT == 2.0


def test_a_dropped_file_is_found_by_what_it_declares_and_no_other_file_is_executed(folder):
    write(folder, "Trap", "from turtle import st\nraise SystemExit('executed')\nclass Trapped(Distiller): ...")
    write(folder, "broken", "def (")
    write(folder, "HintPlus_backup", FEATURE.replace("HintPlus", "OldHint"))
    write(folder, "hints", FEATURE)
    cfg = load_config(options=["DISTILLER.TYPE", "HINTPLUS", *settings_of_feature()])
    assert distiller_dict[cfg.DISTILLER.TYPE].__name__ == "HintPlus"
    assert "OldHint" not in distiller_dict
    assert "mdistiller.distillers.Trap" not in sys.modules


def settings_of_feature():
    return ["HintPlus.LOSS.CE", 1, "HintPlus.LOSS.FEAT", 1, "HintPlus.layer", 1, "HintPlus.SIZE", "(8, 8)"]


def test_a_dropped_file_is_found_by_the_table_alone(folder):
    write(folder, "Found", "from ._base import Distiller\nclass Found(Distiller): ...")
    assert "FOUND" not in distiller_dict
    assert issubclass(distiller_dict["FOUND"], Distiller)
    with pytest.raises(UnknownName, match="no distiller named 'KDD'; closest: KD"):
        distiller_dict["KDD"]


def test_a_name_declared_twice_is_refused(folder):
    for name in ("MV1_a", "MV1_b"):
        write(folder, name, "from ._base import Distiller\nclass MV1(Distiller): ...")
    with pytest.raises(InputError, match=r"'MV1' is declared by MV1_a.py, MV1_b.py"):
        load_config(options=["DISTILLER.TYPE", "MV1"])


def test_the_librarys_own_names_stay(tmp_path):
    own, text = distiller_dict["KD"], "from ._base import Distiller\nclass KD(Distiller): ...\n"
    path = write(tmp_path, "KD", text)
    with pytest.raises(InputError, match=r"names are taken \(KD\); copy it to .* my_KD\.py"):
        load_method_file(path)
    write(tmp_path, "KD", text + "class KD_plus(KD): ...")
    assert distiller_dict["KD"] is own
    options = ["DISTILLER.PLUGINS", str(path), "DISTILLER.TYPE"]
    with pytest.raises(InputError, match=r"DISTILLER.TYPE KD: .*KD\.py has a method of that name, and mdistiller"):
        load_config(options=[*options, "KD"])
    assert load_config(options=[*options, "KD_plus"]).DISTILLER.TYPE == "KD_plus"
    assert distiller_dict["KD"] is own
    write(tmp_path, "my_KD", text)
    assert load_method_file(tmp_path / "my_KD.py").methods.keys() == {"my_KD", "MY_KD"}
    write(tmp_path, "sly", "from ._base import Distiller, distiller_dict\ndistiller_dict['KD'] = Distiller")
    with pytest.raises(InputError, match="replaces KD"):
        load_method_file(tmp_path / "sly.py")
    assert distiller_dict["KD"] is own


@pytest.mark.parametrize(
    ("stem", "name", "taken"), [("ReviewKD", "ReviewKD", "ReviewKD, REVIEWKD"), ("Kd", "kD", "kD, KD, Kd")]
)
def test_the_librarys_own_names_stay_in_any_letter_case(tmp_path, stem, name, taken):
    registered = dict(distiller_dict)
    text = f"from mdistiller.distillers import Distiller\nclass {name}(Distiller): ...\n"
    with pytest.raises(InputError, match=rf"names are taken \({taken}\); copy it to .* my_{stem}\.py"):
        load_method_file(write(tmp_path, stem, text))
    assert dict(distiller_dict) == registered
    path = write(tmp_path, stem, f"{text}class Other(Distiller): ...")
    with pytest.raises(InputError, match=rf"DISTILLER.TYPE {name}: .* has a method of that name, and mdistiller\.dist"):
        load_config(options=["DISTILLER.PLUGINS", str(path), "DISTILLER.TYPE", name])


def test_a_name_that_a_file_registers_beside_the_librarys_own(tmp_path):
    text = """
        from mdistiller.distillers import Distiller, register_distiller

        @register_distiller("reviewkd")
        class FitNet(Distiller): ...
    """
    before = set(distiller_dict)
    file = load_method_file(write(tmp_path, "mine", text))
    assert file.methods.keys() == distiller_dict.keys() - before == {"mine", "MINE"}
    assert file.taken == ("reviewkd", "FitNet", "FITNET")


def test_helpers_beside_the_file_and_imports_that_are_not_used(tmp_path, capsys):
    write(tmp_path, "smoothing", SMOOTHING)
    file = load_method_file(write(tmp_path, "WeakStrong", TWO_VIEWS))
    assert set(file.methods) == {"WeakStrong", "WEAKSTRONG"}
    assert "left out, because it fails and is not used: from no_such_toolkit import st" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (", r"cannot read method file .*bad\.py: invalid syntax.* line 1"),
        ("import os\nfrom no_such_toolkit import st\nst()", r"bad\.py, line 2: ModuleNotFoundError: .*no_such_toolkit"),
        ("x = 1\ny = x / 0", r"bad\.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)", r"bad\.py, line 2: SystemExit: 3"),
        (
            WITH_DEFAULTS.replace('{"SCALE": 2.0, "MODE": "soft"}', "3"),
            r"bad\.py: DEFAULTS must be a dictionary .* not 3",
        ),
        (WITH_DEFAULTS.replace("2.0", "object()"), r"bad\.py: DEFAULTS\['SCALE'\] is <object .* a default is a number"),
    ],
)
def test_a_file_that_cannot_be_loaded_leaves_nothing_behind(tmp_path, text, message):
    registered = dict(distiller_dict)
    with pytest.raises(InputError, match=message):
        load_config(options=["DISTILLER.PLUGINS", str(write(tmp_path, "bad", text))])
    assert dict(distiller_dict) == registered
    write(tmp_path, "bad", FEATURE)  # repaired
    assert "HintPlus" in load_method_file(tmp_path / "bad.py").methods


def test_a_missing_file():
    with pytest.raises(InputError, match=r"no method file .*nowhere\.py; paths in DISTILLER\.PLUGINS are relative to"):
        load_config(options=["DISTILLER.PLUGINS", "nowhere.py"])


# Whose code is executed


@pytest.fixture
def trap(tmp_path):
    """A method file that leaves a mark when it is executed."""
    mark = tmp_path / "executed"
    text = f"open({str(mark)!r}, 'w')\nfrom mdistiller.distillers import KD\nclass TRAP(KD): ...\n"
    return write(tmp_path, "trap", text), mark


def as_config(tmp_path, file):
    return config_file(tmp_path, {"DISTILLER": {"PLUGINS": [str(file)]}})


def as_base(tmp_path, file):
    as_config(tmp_path, file).rename(tmp_path / "base.yaml")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("written", [as_config, as_base])
def test_code_that_a_file_names_runs_by_the_users_leave_only(tmp_path, trap, written):
    file, mark = trap
    config = written(tmp_path, file)
    outcome = run_tool("train", ["--cfg", config, "DISTILLER.TYPE", "TRAP"])
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"{file} (SHA-256 {file_sha256(file)})" in outcome.err and "add --allow-plugins" in outcome.err
    with pytest.raises(InputError, match="names code, which runs with all your rights"):
        CFG.merge_from_file(str(config))
    with pytest.raises(InputError, match=r"merged node: DISTILLER\.PLUGINS names code"):
        CFG.merge_from_other_cfg(CfgNode({"DISTILLER": CfgNode({"PLUGINS": [str(file)]})}))
    load_config(str(config), ["DISTILLER.PLUGINS", "[]"])
    load_config(options=["DISTILLER.TYPE", "KD"])
    assert not mark.exists()
    assert load_config(str(config), ["DISTILLER.TYPE", "TRAP"], allow_plugins=True).DISTILLER.TYPE == "TRAP"
    assert mark.exists()


def test_code_that_the_command_line_names_runs(tmp_path, trap):
    file, mark = trap
    config = as_config(tmp_path, file)
    for value in (str(file), f"[{file}]"):
        assert load_config(str(config), ["DISTILLER.PLUGINS", value]).DISTILLER["PLUGINS"] == [str(file)]
    assert mark.exists()


@pytest.mark.parametrize("place", ["OPTIONS", "METHODS", "CONFIG"])
def test_code_that_a_plan_names_runs_by_the_users_leave_only(tmp_path, trap, place):
    file, mark = trap
    plugins = {"DISTILLER.PLUGINS": [str(file)]}
    config = as_config(tmp_path, file) if place == "CONFIG" else config_file(tmp_path, {})
    plan = {
        "TITLE": "x", "OUTPUT": str(tmp_path / "plan"), "SEEDS": [0], "PAIRS": {"pair": None},
        "METHODS": {"trap": {"CONFIG": str(config), "OPTIONS": plugins if place == "METHODS" else {}}},
        "OPTIONS": plugins if place == "OPTIONS" else {},
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    outcome = run_tool("reproduce", ["--plan", path])
    assert outcome.code == 2 and "DISTILLER.PLUGINS names code" in outcome.err, outcome
    assert not mark.exists()
    load_plan(path, allow_plugins=True)
    assert mark.exists()


# Configured


def test_files_on_the_command_line_as_a_bare_list(tmp_path):
    paths = [write(tmp_path, "hints", FEATURE), write(tmp_path, "Stated", WITH_DEFAULTS)]
    cfg = load_config(options=["DISTILLER.PLUGINS", f"[{paths[0]}, {paths[1]}]", "DISTILLER.TYPE", "STATED"])
    assert cfg.DISTILLER["PLUGINS"] == [str(path) for path in paths]


def test_a_yaml_with_the_file_and_its_section_merges_in_one_go(tmp_path):
    path = write(tmp_path, "hints", FEATURE)
    given = {"DISTILLER": {"TYPE": "HintPlus", "PLUGINS": [str(path)]}, "HintPlus": FEATURE_SETTINGS}
    cfg = load_config(
        str(config_file(tmp_path, given)), ["HintPlus.LOSS.FEAT", "0.5", "HintPlus.new.key", "1e-3"], allow_plugins=True
    )
    assert cfg.HintPlus.SIZE == (8, 8)
    assert (cfg.HintPlus.LOSS.FEAT, cfg.HintPlus.new.key) == (0.5, 1e-3)
    assert "HintPlus" not in CFG
    again = tmp_path / "merged.yaml"
    again.write_text(cfg.dump())
    assert flatten(load_config(str(again), allow_plugins=True)) == flatten(cfg)


def test_mdistillers_way_of_merging(tmp_path):
    path = write(tmp_path, "hints", FEATURE)
    given = {"DISTILLER": {"TYPE": "HintPlus", "PLUGINS": [str(path)]}, "HintPlus": FEATURE_SETTINGS}
    CFG.merge_from_file(str(config_file(tmp_path, given)), allow_plugins=True)
    CFG.merge_from_list(["HintPlus.layer", "1"])
    CFG.freeze()
    assert CFG.HintPlus.layer == 1


def test_unknown_keys_elsewhere_are_refused_as_ever(tmp_path):
    path = write(tmp_path, "hints", FEATURE)
    given = {"DISTILLER": {"TYPE": "HintPlus", "PLUGINS": [str(path)]}, "HintPlus": FEATURE_SETTINGS}
    for tree, key in (({"device": 0}, "device"), ({"SOLVER": {"BACTH_SIZE": 5}}, "SOLVER.BACTH_SIZE")):
        with pytest.raises(InputError, match=f"unknown config key '{key}'"):
            load_config(str(config_file(tmp_path, given | tree)), allow_plugins=True)


def test_a_method_that_is_not_there_is_named_rather_than_its_section(tmp_path):
    config = config_file(tmp_path, {"DISTILLER": {"TYPE": "QKD"}, "QKD": {"BETA": 8.0}})
    with pytest.raises(InputError, match=r"no distiller named 'QKD'; closest: .*KD.*; name .* in DISTILLER\.PLUGINS"):
        load_config(str(config))


@pytest.mark.parametrize(("text", "found"), [("", "no method"), (FEATURE, "HintPlus, HINTPLUS, some, SOME")])
def test_a_refused_name_says_what_the_method_files_hold(tmp_path, text, found):
    path = write(tmp_path, "some", text)
    message = rf"no distiller named 'MINE'; .*PLUGINS; {path} was read and holds {found}"
    with pytest.raises(InputError, match=message):
        load_config(options=["DISTILLER.PLUGINS", str(path), "DISTILLER.TYPE", "MINE"])


def test_a_section_that_nobody_has_may_be_a_method_files(tmp_path):
    config = config_file(tmp_path, {"GDKD": {"W0": 1.0}})
    with pytest.raises(InputError, match=r"key 'GDKD\.W0'; closest: .*; if a method file reads it, name the"):
        load_config(str(config))


def test_a_flag_of_another_projects_script_gets_advice():
    outcome = run_tool("train", ["--same-t", "--kd-weight", "2", "DISTILLER.TYPE", "KD"])
    assert outcome.code == 2
    assert "unrecognized arguments: --same-t --kd-weight; see --help. A flag of another project's" in outcome.err


def test_missing_settings_are_named_before_anything_starts(tmp_path):
    write(tmp_path, "smoothing", SMOOTHING)
    options = ["DISTILLER.PLUGINS", str(write(tmp_path, "WeakStrong", TWO_VIEWS)), "DISTILLER.TYPE", "WeakStrong"]
    with pytest.raises(InputError, match=r"WeakStrong\.py reads settings .* not set: EXPERIMENT\.SCALED;"):
        load_config(options=options)
    assert load_config(options=[*options, "EXPERIMENT.SCALED", "True"]).EXPERIMENT.SCALED is True
    with pytest.raises(InputError, match=r"unknown config key 'EXPERIMENT\.SCALE'"):
        load_config(options=[*options, "EXPERIMENT.SCALE", "True"])


def test_settings_read_in_a_branch_or_at_the_top_of_the_tree(tmp_path):
    text = """
        from ._base import Distiller

        class Branch(Distiller):
            def __init__(self, student, teacher, cfg):
                super().__init__(student, teacher)
                self.m = cfg.M
                if self.m > 1:
                    self.extra = cfg.BRANCH.EXTRA
    """
    options = ["DISTILLER.PLUGINS", str(write(tmp_path, "Branch", text)), "DISTILLER.TYPE", "BRANCH"]
    with pytest.raises(InputError, match="not set: M;"):
        load_config(options=options)
    assert load_config(options=[*options, "M", "1"]).M == 1


def test_shares_of_classes_are_refused_for_a_file_that_reads_class_numbers(tmp_path):
    tree = {"DISTILLER": {"TYPE": "HintPlus", "PLUGINS": [str(write(tmp_path, "hints", FEATURE))]}}
    path = config_file(tmp_path, {**tree, "HintPlus": FEATURE_SETTINGS})
    message = r"DATASET\.MIXUP_ALPHA 1\.0: labels become shares .* method HintPlus reads class numbers"
    with pytest.raises(InputError, match=message):
        load_config(path, ["DATASET.MIXUP_ALPHA", 1], allow_plugins=True)


def test_defaults_of_a_file_are_its_section(tmp_path):
    options = ["DISTILLER.PLUGINS", str(write(tmp_path, "Stated", WITH_DEFAULTS)), "DISTILLER.TYPE", "STATED"]
    cfg = load_config(options=[*options, "STATED.SCALE", "3"])
    assert (cfg.STATED.SCALE, cfg.STATED.MODE) == (3.0, "soft")
    with pytest.raises(InputError, match=r"unknown config key 'STATED\.SCALES'; closest: STATED\.SCALE"):
        load_config(options=[*options, "STATED.SCALES", "3"])


# Defaults of a fork


def test_a_forks_defaults_are_read_and_not_executed(tmp_path):
    options = ["DISTILLER.PLUGINS", str(write_fork(tmp_path / "fork")), "DISTILLER.TYPE", "NEWKD"]
    cfg = load_config(options=options)
    assert (cfg.NEWKD.LOSS.CE_WEIGHT, cfg.NEWKD.SHAPES, cfg.NEWKD.UNREAD, cfg.NEWKD.MODE) == (
        2.0,
        [1, 8],
        "word",
        "soft",
    )
    assert "ROOT" not in cfg.NEWKD and "OTHER" not in cfg
    assert (cfg.KD.TEMPERATURE, cfg.SOLVER.ALPHA, cfg.SOLVER.EPOCHS) == (7.0, 31.0, 240)
    assert "NEWKD" not in CFG and CFG.KD.TEMPERATURE == 4.0
    again = load_config(options=[*options, "KD.TEMPERATURE", "3", "NEWKD.LOSS.CE_WEIGHT", "1", "SOLVER.ALPHA", "0.99"])
    assert (again.KD.TEMPERATURE, again.NEWKD.LOSS.CE_WEIGHT, again.SOLVER.ALPHA) == (3.0, 1.0, 0.99)
    with pytest.raises(InputError, match=r"NEWKD\.LOSS\.CE_WEIGHT takes a finite number"):
        load_config(options=[*options, "NEWKD.LOSS.CE_WEIGHT", "Ture"])


def test_the_folder_of_a_fork_can_be_named(tmp_path):
    write_fork(tmp_path / "fork")
    text = FORKS_METHOD.replace("from ..tricks", "from .tricks").replace("from ..KD", "from .tricks")
    path = write(tmp_path / "copied", "NEWKD", text)
    write(tmp_path / "copied", "tricks", "def doubled(x): ...\nhalved = kd_loss = doubled\n")
    options = ["DISTILLER.PLUGINS", str(path), "DISTILLER.TYPE", "NEWKD", "NEWKD.MODE", "x"]
    with pytest.raises(InputError, match=r"not set: NEWKD\.LOSS\.CE_WEIGHT, NEWKD\.SHAPES; .*DISTILLER\.FORK"):
        load_config(options=options)
    assert load_config(options=[*options, "DISTILLER.FORK", str(tmp_path / "fork")]).NEWKD.SHAPES == [1, 8]
    with pytest.raises(InputError, match=r"DISTILLER\.FORK .* is no fork of mdistiller: there is no .*engine/cfg\.py"):
        load_config(options=[*options, "DISTILLER.FORK", str(tmp_path)])


def test_a_forks_defaults_are_not_those_of_another_method(tmp_path):
    given = {"DISTILLER": {"TYPE": "NEWKD", "PLUGINS": [str(write_fork(tmp_path / "fork"))]}, "NEWKD": {"MODE": "x"}}
    cfg = load_config(str(config_file(tmp_path, given)), ["DISTILLER.TYPE", "KD"], allow_plugins=True)
    assert (cfg.KD.TEMPERATURE, cfg.SOLVER.ALPHA) == (4.0, 0.99)


def test_a_key_of_ours_has_the_forks_meaning_for_its_method_alone(tmp_path):
    given = {"DISTILLER": {"TYPE": "NEWKD", "PLUGINS": [str(write_fork(tmp_path / "fork"))]}, "SOLVER": {"ALPHA": 33.0}}
    cfg = load_config(str(config_file(tmp_path, given)), ["SOLVER.EPOCHS", "1"], allow_plugins=True)
    trainer, _ = build_run(cfg)
    assert trainer.distiller.given == (33.0, 7.0, 1)
    assert trainer.cfg.SOLVER.ALPHA == 0.99
    outcome = train(config_file(tmp_path, given), "SOLVER.EPOCHS", 1)
    assert outcome.code == 0, outcome
    config = tmp_path / "output" / "distill" / "default" / "config.yaml"
    assert yaml.safe_load(config.read_text())["SOLVER"]["ALPHA"] == 33.0
    assert train(config, "--resume", "SOLVER.EPOCHS", 2).code == 0
    given["SOLVER"]["ALPHA"] = 34.0
    assert "SOLVER.ALPHA was 33.0, is 34.0" in train(config_file(tmp_path, given), "--resume", "SOLVER.EPOCHS", 3).err


# Built and trained


def test_a_feature_method_trains_resumes_and_says_which_file_it_was(tmp_path):
    path = write(tmp_path, "hints", FEATURE)
    given = {"DISTILLER": {"TYPE": "HINTPLUS", "PLUGINS": [str(path)]}, "HintPlus": FEATURE_SETTINGS}
    config = config_file(tmp_path, given)
    outcome = train(config, "SOLVER.EPOCHS", 2)
    assert outcome.code == 0, outcome
    run = tmp_path / "output" / "distill" / "default"
    results = json.loads((run / "results.json").read_text())
    assert results["method_file"]["path"] == str(path)
    assert results["extra_parameters"] == (32 * 32 + 32) + 2 * 32  # convolution and batch norm
    latest = torch.load(run / "latest", weights_only=True)
    assert any(key.startswith("reg.conv") for key in latest["model"])
    resumed = train(run / "config.yaml", "--resume", "SOLVER.EPOCHS", 3)
    assert resumed.code == 0 and "has changed" not in resumed.out
    path.write_text(path.read_text() + "# a change\n")
    outcome = train(run / "config.yaml", "--resume", "SOLVER.EPOCHS", 4)
    assert outcome.code == 0 and f"resuming although {path} has changed since: its SHA-256 was" in outcome.out


def test_two_views(tmp_path):
    write(tmp_path, "smoothing", SMOOTHING)
    path = write(tmp_path, "WeakStrong", TWO_VIEWS)
    given = {"DISTILLER": {"TYPE": "WeakStrong", "PLUGINS": [str(path)]}, "EXPERIMENT": {"SCALED": False}}
    outcome = train(config_file(tmp_path, given), "SOLVER.TRAINER", "ours", "SOLVER.EPOCHS", 1)
    assert outcome.code == 0, outcome


def test_a_memory_bank_gets_index_and_negatives(tmp_path):
    path = write(tmp_path, "Bank", MEMORY)
    given = {"DISTILLER": {"TYPE": "Bank", "PLUGINS": [str(path)]}, "CRD": {"NCE": {"K": 5}}}
    outcome = train(config_file(tmp_path, given), "SOLVER.TRAINER", "crd", "SOLVER.EPOCHS", 1)
    assert outcome.code == 0, outcome


def test_a_plan_with_a_method_file_runs_in_processes_of_its_own(tmp_path):
    path = write(tmp_path, "Stated", WITH_DEFAULTS)
    config = config_file(tmp_path, {"DISTILLER": {"TYPE": "STATED", "PLUGINS": [str(path)]}})
    plan = {
        "TITLE": "x", "OUTPUT": str(tmp_path / "plan"), "SEEDS": [0], "PAIRS": {"pair": None},
        "METHODS": {"stated": {"CONFIG": str(config)}}, "OPTIONS": {"SOLVER.EPOCHS": 1},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    outcome = run_tool("reproduce", ["--plan", tmp_path / "plan.yaml", "--jobs", 1, "--allow-plugins"])
    assert outcome.code == 0, outcome


IN_CONSTRUCTOR = "self.scale = cfg.STATED.SCALE"
IN_STEP = "logits, _ = self.student(image)"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            IN_CONSTRUCTOR,
            "self.scale = 1 / 0",
            "error: raised in the method file {}, line 10: ZeroDivisionError: division",
        ),
        (IN_STEP, "1 / 0", "error: raised in the method file {}, line 13: ZeroDivisionError: division"),
        (IN_STEP, "raise SystemExit(0)", "error: the method file {}, line 13, ended the program by SystemExit: 0"),
    ],
)
def test_an_error_inside_a_file_ends_with_the_files_name(tmp_path, before, after, message):
    path = write(tmp_path, "Stated", WITH_DEFAULTS.replace(before, after))
    outcome = train(config_file(tmp_path, {"DISTILLER": {"TYPE": "STATED", "PLUGINS": [str(path)]}}))
    assert outcome.code == 1
    assert message.format(path) in outcome.err.splitlines()[-1]
    assert ("Traceback" in outcome.err) == ("SystemExit" not in after)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the file works where there is a GPU")
@pytest.mark.parametrize(("text", "line"), [(CUDA_IN_STEP, 12), (CUDA_IN_CONSTRUCTOR, 8)], ids=["step", "constructor"])
def test_code_for_gpus_is_named_and_ends_with_one_message(tmp_path, text, line):
    path = write(tmp_path, "NeedsGpu", text)
    given = {"DISTILLER": {"TYPE": "NeedsGpu", "PLUGINS": [str(path)]}}
    outcome = train(config_file(tmp_path, given))
    assert outcome.code == 2, outcome
    assert f"error: {path}, line {line}: " in outcome.err
    assert "needs a GPU, and this run is on the CPU; run it on a GPU (SOLVER.DEVICE), or let the file" in outcome.err
    assert "Traceback" not in outcome.err


class Positional(Distiller):
    def __init__(self, net, big_net, configuration, count):
        super().__init__(net, big_net)
        self.given = configuration, count


class HandsOn(Positional):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, 7, **kwargs)


class Optional(Distiller):
    def __init__(self, student, teacher, cfg, extra=3, num_data=0, **kwargs):
        super().__init__(student, teacher)
        self.given = extra, num_data


class StudentOnly(Distiller):
    def __init__(self, student):
        super().__init__(student)


class TooMuch(Distiller):
    def __init__(self, student, teacher, cfg, num_data, moon): ...


def test_constructors_get_their_arguments_by_name_or_by_place(tmp_path):
    distiller_dict.update({cls.__name__: cls for cls in (Positional, HandsOn, Optional, StudentOnly)})
    student, teacher = (build_student(tiny_config(tmp_path), 10) for _ in range(2))

    def built(name):
        cfg = tiny_config(tmp_path, DISTILLER__TYPE=name)
        return cfg, build_distiller(cfg, student, teacher, num_data=30)

    for name, expected in (("Positional", 30), ("HandsOn", 7)):
        cfg, distiller = built(name)
        assert (distiller.student, distiller.teacher) == (student, teacher)
        assert distiller.given == (cfg, expected)
    assert built("Optional")[1].given == (3, 30)
    assert built("StudentOnly")[1].teacher is None
    with pytest.raises(
        InputError, match=r"test_plugins.py, TooMuch: the constructor asks for 'moon', which the library"
    ):
        contract_of(TooMuch)


class TrainsTeacher(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)

    def forward_train(self, image, target): ...

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.teacher.fc.parameters())


def test_a_method_that_optimises_the_frozen_teacher_is_refused(tmp_path):
    distiller_dict["TrainsTeacher"] = TrainsTeacher
    with pytest.raises(InputError, match="TrainsTeacher optimises parameters of the teacher, which is frozen"):
        make_trainer(tmp_path, DISTILLER__TYPE="TrainsTeacher", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path))
