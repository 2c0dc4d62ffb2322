"""Configuration: loose types, inheritance, mdistiller's keys and files, and everything below ``configs/``."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import yaml

from mdistiller.contract import contract_of
from mdistiller.engine.build import build_student, model_table, training_recipe
from mdistiller.engine.cfg import CFG, experiment_name, load_config, relevant_part, show_cfg
from mdistiller.engine.config.experiment import flatten
from mdistiller.engine.config.node import ConfigNode
from mdistiller.registry import InputError, distiller_dict

CONFIGS = Path(__file__).parents[2] / "configs"


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


# Types

NODE = {"WHOLE": 4, "NUMBER": 8.0, "FLAG": False, "TEXT": "", "STAGES": [150, 180], "BETAS": (0.9, 0.999), "NONE": None}

ACCEPTED = [
    ("WHOLE", 8.0, 8),
    ("WHOLE", "8", 8),
    ("WHOLE", "1e3", 1000),
    ("WHOLE", 2**53 + 1, 2**53 + 1),  # more digits than a float holds
    ("WHOLE", str(2**53 + 1), 2**53 + 1),
    ("NUMBER", 8, 8.0),
    ("NUMBER", "8", 8.0),
    ("NUMBER", "1e-3", 0.001),
    ("FLAG", "true", True),
    ("FLAG", "False", False),
    ("FLAG", "off", False),
    ("FLAG", "yes", True),
    ("FLAG", True, True),
    ("TEXT", 5, "5"),
    ("TEXT", 0.5, "0.5"),
    ("TEXT", None, ""),
    ("TEXT", "kd,res56,res20", "kd,res56,res20"),
    ("STAGES", (90, 120), [90, 120]),
    ("STAGES", [90.0, "120"], [90, 120]),
    ("STAGES", "[90, 120]", [90, 120]),
    ("STAGES", [], []),
    ("BETAS", [1, 0.5], (1.0, 0.5)),
    ("NONE", "anything", "anything"),
]

REFUSED = [
    ("WHOLE", 2.5, "a whole number"),
    ("WHOLE", True, "a whole number"),
    ("WHOLE", "many", "a whole number"),
    ("WHOLE", None, "a whole number"),
    ("WHOLE", [4], "a whole number"),
    ("NUMBER", True, "a finite number"),
    ("NUMBER", "fast", "a finite number"),
    ("NUMBER", float("nan"), "a finite number"),
    ("NUMBER", "inf", "a finite number"),
    ("NUMBER", {"A": 1}, "a finite number"),
    ("FLAG", 1, "True or False"),
    ("FLAG", "maybe", "True or False"),
    ("TEXT", True, "a text"),
    ("TEXT", ["a"], "a text"),
    ("STAGES", 150, "a list"),
    ("STAGES", [150.5], "a whole number"),
    ("BETAS", 0.9, "a tuple"),
]


@pytest.mark.parametrize(("key", "value", "expected"), ACCEPTED)
def test_values_convert_where_nothing_is_lost(key, value, expected):
    node = ConfigNode(NODE)
    node.merge_from_list([key, value])
    assert node[key] == expected
    assert NODE[key] is None or type(node[key]) is type(NODE[key])


@pytest.mark.parametrize(("key", "value", "wanted"), REFUSED)
def test_other_values_are_refused(key, value, wanted):
    tree = ConfigNode(NODE)
    with pytest.raises(InputError, match=f"{key} takes {wanted}.*got"):
        tree.merge_from_other_cfg({key: value})


@pytest.mark.parametrize("word", ["1e3", "007", "True", "None", "1,2", "[a]", "kd"])
def test_a_text_on_the_command_line_stays_what_was_typed(word):
    name = load_config(options=["EXPERIMENT.NAME", word]).EXPERIMENT.NAME
    assert name == word


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("[a/B.py, ../c d.py]", ["a/B.py", "../c d.py"]),
        ("['a/B.py', \"c.py\"]", ["a/B.py", "c.py"]),
        ("a/B.py", ["a/B.py"]),
        ("[a]/B.py", ["[a]/B.py"]),
        ("[a: [b]", ["[a: [b]"]),  # no list
    ],
)
def test_a_list_of_texts_needs_no_quotes_on_the_command_line(word, expected):
    node = ConfigNode({"FILES": []})
    node.merge_from_list(["FILES", word])
    assert node["FILES"] == expected


def test_words_that_old_yaml_takes_for_booleans(tmp_path):
    """``AMP: off`` was once read as ``False`` and refused."""
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {AMP: off}\nLOG: {PROGRESS: on, WANDB: off}\nDATASET: {DOWNLOAD: no}")
    cfg = load_config(path)
    assert (cfg.SOLVER.AMP, cfg.LOG.PROGRESS, cfg.LOG.WANDB, cfg.DATASET.DOWNLOAD) == ("off", "on", False, False)


# Inheritance


def test_bases_are_merged_first_and_in_order(tmp_path):
    write(tmp_path / "root.yaml", SOLVER={"LR": 0.1, "EPOCHS": 1, "MOMENTUM": 0.1}, EXPERIMENT={"TAG": "root"})
    write(tmp_path / "left.yaml", _BASE_="root.yaml", SOLVER={"LR": 0.2, "EPOCHS": 2})
    write(tmp_path / "right.yaml", SOLVER={"EPOCHS": 3})
    (tmp_path / "child").mkdir()
    child = write(tmp_path / "child" / "a.yaml", _BASE_=["../left.yaml", "../right.yaml"], EXPERIMENT={"TAG": "child"})
    cfg = load_config(child, ["SOLVER.WEIGHT_DECAY", "0"])
    found = (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS, cfg.SOLVER.MOMENTUM, cfg.EXPERIMENT.TAG, cfg.SOLVER.WEIGHT_DECAY)
    assert found == (0.2, 3, 0.1, "child", 0)


@pytest.mark.parametrize("bases", [["left", "right"], ["right", "left"], ["left", "root"]])
def test_a_base_reached_twice_is_merged_once_before_all_that_build_on_it(tmp_path, bases):
    """It was merged a second time, over the files merged since. Only a file that is its own ancestor is a cycle."""
    write(tmp_path / "root.yaml", SOLVER={"LR": 0.1, "EPOCHS": 1})
    write(tmp_path / "left.yaml", _BASE_="root.yaml", SOLVER={"LR": 0.2})
    write(tmp_path / "right.yaml", _BASE_=["../" + tmp_path.name + "/root.yaml"], SOLVER={"MOMENTUM": 0.5})
    cfg = load_config(write(tmp_path / "a.yaml", _BASE_=[f"{base}.yaml" for base in bases]))
    assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS) == (0.2, 1)


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        (["root.yaml", "loop.yaml"], "(the _BASE_ of {0}/loop.yaml) inherits from itself: {0}/a.yaml -> {0}/loop.yaml"),
        (["root.yaml", "rot.yaml"], "no config file {0}/rot.yaml (the _BASE_ of {0}/a.yaml); in {0}, closest: "),
        (["root.yaml", 5], "_BASE_ takes a file or a list of files, got ['root.yaml', 5]"),
        ({"root.yaml": 1}, "_BASE_ takes a file or a list of files, got {{'root.yaml': 1}}"),
    ],
)
def test_a_wrong_base_among_others_is_named(tmp_path, bases, message):
    write(tmp_path / "root.yaml", SOLVER={"LR": 0.1})
    write(tmp_path / "loop.yaml", _BASE_=["root.yaml", "a.yaml"])
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path / "a.yaml", _BASE_=bases))
    assert message.format(tmp_path) in str(error.value)


def test_a_text_may_add_to_the_text_so_far(tmp_path):
    write(tmp_path / "method.yaml", EXPERIMENT={"TAG": "kd"})
    write(tmp_path / "pair.yaml", EXPERIMENT={"TAG": "{TAG},res20,res8", "NAME": "{TAG}{}"})
    path = write(tmp_path / "a.yaml", _BASE_=["method.yaml", "pair.yaml"])
    assert load_config(path).EXPERIMENT.TAG == "kd,res20,res8"
    assert load_config(path).EXPERIMENT.NAME == "{TAG}{}"  # of its own value only
    assert load_config(path, ["EXPERIMENT.TAG", "{TAG},t2"]).EXPERIMENT.TAG == "kd,res20,res8,t2"
    assert load_config(path, ["EXPERIMENT.TAG", "x"]).EXPERIMENT.TAG == "x"
    (tmp_path / "again.yaml").write_text(load_config(path).dump())  # a run's config.yaml
    assert load_config(tmp_path / "again.yaml") == load_config(path)


@pytest.mark.parametrize("content", ["_BASE_:", "_BASE_: []"])
def test_an_empty_base_changes_nothing(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    assert load_config(path) == load_config()


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    """Rather than training what the defaults say for 240 epochs."""
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"a\.yaml is empty; it must hold keys"):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("SOLVER.BATHC_SIZE", "closest: SOLVER.BATCH_SIZE"),
        ("LR", "closest: SOLVER.LR"),
        ("DISTILER.TYPE", "closest: DISTILLER.TYPE"),
        ("KD.TEMPRATURE", "closest: KD.TEMPERATURE"),
        ("solver.lr", "closest: SOLVER.LR"),
        ("OPTIMIZER", "sections: EXPERIMENT, DATASET, DISTILLER"),
        ("KD.LOSS.WIEGHT", "closest: KD.LOSS.KD_WEIGHT, KD.LOSS.CE_WEIGHT"),
        ("KD.LOSS.X", "KD.LOSS has: CE_WEIGHT, KD_WEIGHT"),
        ("SOLVER.TEMPERATURE", "closest: "),
    ],
)
def test_an_unknown_key_comes_with_the_closest(key, shown):
    with pytest.raises(InputError) as error:
        load_config(options=[key, "1"])
    assert f"unknown config key {key!r}; {shown}" in str(error.value)


# mdistiller's ways

# mdistiller's defaults (``mdistiller/engine/cfg.py``), except that LOG.WANDB is on there.
MDISTILLERS_DEFAULTS = """
EXPERIMENT: {PROJECT: distill, NAME: "", TAG: default}
DATASET: {TYPE: cifar100, NUM_WORKERS: 2, TEST: {BATCH_SIZE: 64}}
DISTILLER: {TYPE: NONE, TEACHER: ResNet50, STUDENT: resnet32}
SOLVER:
  {TRAINER: base, BATCH_SIZE: 64, EPOCHS: 240, LR: 0.05, LR_DECAY_STAGES: [150, 180, 210], LR_DECAY_RATE: 0.1,
   WEIGHT_DECAY: 0.0001, MOMENTUM: 0.9, TYPE: SGD, DOT: {DELTA: 0.075}}
LOG: {TENSORBOARD_FREQ: 500, SAVE_CHECKPOINT_FREQ: 40, PREFIX: ./output, WANDB: false}
KD: {TEMPERATURE: 4, LOSS: {CE_WEIGHT: 0.1, KD_WEIGHT: 0.9}}
AT: {P: 2, LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 1000}}
RKD:
  {DISTANCE_WEIGHT: 25, ANGLE_WEIGHT: 50, LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 1},
   PDIST: {EPSILON: 1.0e-12, SQUARED: false}}
FITNET: {HINT_LAYER: 2, INPUT_SIZE: [32, 32], LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 100}}
KDSVD: {K: 1, LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 1}}
OFD: {LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 0.001}, CONNECTOR: {KERNEL_SIZE: 1}}
NST: {LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 50}}
PKT: {LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 30000}}
SP: {LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 3000}}
VID: {LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 1}, EPS: 1.0e-5, INIT_PRED_VAR: 5, INPUT_SIZE: [32, 32]}
CRD:
  {MODE: exact, FEAT: {DIM: 128, STUDENT_DIM: 256, TEACHER_DIM: 256}, LOSS: {CE_WEIGHT: 1, FEAT_WEIGHT: 0.8},
   NCE: {K: 16384, MOMENTUM: 0.5, TEMPERATURE: 0.07}}
REVIEWKD:
  {CE_WEIGHT: 1, REVIEWKD_WEIGHT: 1, WARMUP_EPOCHS: 20, SHAPES: [1, 8, 16, 32], OUT_SHAPES: [1, 8, 16, 32],
   IN_CHANNELS: [64, 128, 256, 256], OUT_CHANNELS: [64, 128, 256, 256], MAX_MID_CHANNEL: 512, STU_PREACT: false}
DKD: {CE_WEIGHT: 1, ALPHA: 1, BETA: 8, T: 4, WARMUP: 20}
"""


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def mdistillers_defaults() -> list[tuple[str, object]]:
    """Of the methods that there are."""
    tree = yaml.safe_load(MDISTILLERS_DEFAULTS)
    if "DOT" not in CFG.SOLVER:
        del tree["SOLVER"]["DOT"]
    return list(leaves({section: keys for section, keys in tree.items() if section in CFG}))


@pytest.mark.parametrize(("key", "value"), mdistillers_defaults())
def test_mdistillers_defaults_are_ours(key, value):
    assert flatten(CFG)[key] == value


FLAT_YAML = """
EXPERIMENT:
  NAME: ""
  TAG: "kd,res32x4,res8x4"
  PROJECT: "cifar100_baselines"
DISTILLER:
  TYPE: "KD"
  TEACHER: "resnet32x4"
  STUDENT: "resnet8x4"
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: 0.05
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: "SGD"
"""


def test_mdistillers_flat_yaml_is_our_config_of_that_pair(tmp_path):
    (tmp_path / "kd.yaml").write_text(FLAT_YAML)
    flat = load_config(tmp_path / "kd.yaml")
    assert flat == load_config(CONFIGS / "cifar100/kd/res32x4_res8x4.yaml")
    assert flat == load_config(CONFIGS / "cifar100/kd.yaml")


def test_mdistillers_way_over_the_global_tree(tmp_path, capsys):
    (tmp_path / "kd.yaml").write_text(FLAT_YAML)
    cfg = CFG.clone()  # the same class; the global one stays clean for the other tests
    cfg.merge_from_file(str(tmp_path / "kd.yaml"))
    cfg.merge_from_list(["KD.TEMPERATURE", "2", "SOLVER.LR", "1"])
    cfg.freeze()
    assert (cfg.KD.TEMPERATURE, cfg.SOLVER.LR, cfg.DISTILLER.STUDENT) == (2.0, 1.0, "resnet8x4")
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SOLVER.LR = 0.1
    show_cfg(cfg)
    assert "STUDENT: resnet8x4" in capsys.readouterr().out


def test_loading_leaves_the_defaults_alone():
    before = CFG.dump()
    assert load_config(options=["SOLVER.LR", "1"]).is_frozen()
    assert (CFG.dump(), CFG.is_frozen()) == (before, False)


def test_what_a_run_reads():
    part = relevant_part(load_config(options=["DISTILLER.TYPE", "KD_TWO_VIEWS"]))
    assert set(part) == {"EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG", "KD"}
    assert "KD" not in relevant_part(load_config())


@pytest.mark.parametrize(
    ("project", "name", "tag", "expected"),
    [("p", "n", "t", "p/n"), ("p", "", "t,u", "p/t,u"), ("", "n", "t", "n"), ("p", "a/b", "t", "p/a/b")],
)
def test_a_runs_folder(project, name, tag, expected):
    """An empty project once made the folder an absolute one."""
    options = {"EXPERIMENT.PROJECT": project, "EXPERIMENT.NAME": name, "EXPERIMENT.TAG": tag}
    assert experiment_name(load_config(options=[part for item in options.items() for part in item])) == expected


@pytest.mark.parametrize("key", ["PROJECT", "NAME", "TAG"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/tmp/x", "must lie below LOG.PREFIX"),
        ("a/../../x", "must lie below LOG.PREFIX"),
        ("a\nb", "must not hold line breaks"),
        ("a\0b", "must not hold line breaks"),
        ("<b>", "must not hold line breaks"),
        ("a/" + 150 * "ä", "at most 200 bytes"),
    ],
)
def test_names_that_no_folder_should_have_are_refused(key, value, message):
    with pytest.raises(InputError, match=f"EXPERIMENT.{key} '.*{message}"):
        load_config(options=[f"EXPERIMENT.{key}", value])


# Everything below configs/; a name that begins with _ is that of a base or of a folder of bases

FILES = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "plans" and not any(part.startswith("_") for part in path.relative_to(CONFIGS).parts)
]
PAIR_FILES = [path for path in FILES if path.parent.parent != CONFIGS]  # configs/<data set>/<method>/<pair>.yaml
METHOD_FILES = [path for path in FILES if path.parent == CONFIGS / "folder"]  # the user names the pair
LIGHT = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def short(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def by_folder(files: list[Path]):
    """Run a test once for each folder, with its files."""
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    return pytest.mark.parametrize("paths", folders.values(), ids=map(short, folders))


@functools.cache
def config(path: Path) -> ConfigNode:
    try:
        return load_config(path)
    except InputError as error:
        pytest.fail(f"{short(path)}: {error}")


@by_folder(FILES)
def test_configs_load_and_name_models_that_exist(paths):
    for path in paths:
        cfg = config(path)
        assert path.relative_to(CONFIGS).parts[0] == cfg.DATASET.TYPE, short(path)
        for name in (cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER):
            assert name in model_table(cfg), short(path)


@by_folder(PAIR_FILES)
def test_tags_are_paths_and_comments_the_commands(paths):
    for path in paths:
        cfg = config(path)
        method, _, pair = cfg.EXPERIMENT.TAG.partition(",")
        assert (method, pair.replace(",", "_")) == (path.parent.name, path.stem)
        assert f"# python tools/train.py --cfg configs/{short(path)}.yaml\n" in path.read_text(), short(path)
        method_class = distiller_dict[cfg.DISTILLER.TYPE]
        is_plain = "teacher" not in method_class.__init__.__annotations__ and not method_class.networks
        assert is_plain == method.startswith("vanilla"), short(path)


@by_folder(METHOD_FILES)
def test_every_method_has_a_config_for_folders(paths):
    for path in paths:
        cfg = config(path)
        assert path.stem == cfg.EXPERIMENT.TAG and cfg.EXPERIMENT.PROJECT == "folder", short(path)
        command = f"# python tools/train.py --cfg configs/{short(path)}.yaml DATASET.FOLDER.TRAIN photos"
        assert command in path.read_text(), short(path)
        assert ("DISTILLER.TEACHER_CKPT" in path.read_text()) == contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher
    ours = {method for method in distiller_dict.values() if method.__module__.startswith("mdistiller.")}
    assert ours == {distiller_dict[config(path).DISTILLER.TYPE] for path in paths}


@by_folder(PAIR_FILES)
def test_configs_are_the_method_s_recipe_with_the_pair(paths):
    for path in paths:
        bases, pair = stated(path).get("_BASE_", []), f"../_pairs_/{path.name}"
        assert "_method_.yaml" in bases, short(path)
        if (path.parent / pair).exists():
            assert bases == ["_method_.yaml", pair], short(path)


@by_folder([path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "plans"])
def test_configs_say_nothing_that_their_bases_say(paths, tmp_path):
    for path in paths:
        own = stated(path)
        bases = own.pop("_BASE_", [])
        bases = [bases] if isinstance(bases, str) else bases
        inherited = ConfigNode(new_allowed=True)
        inherited.merge_from_file(write(tmp_path / "a.yaml", _BASE_=[str(path.parent / base) for base in bases]))
        inherited = list(leaves(inherited))
        assert not [item for item in leaves(own) if item in inherited], short(path)


def stated(path: Path) -> dict:
    """The keys of one file, without those of its bases."""
    return yaml.safe_load(path.read_text())


@by_folder([path for path in PAIR_FILES if "cifar100" in path.parts])
def test_the_recipe_on_cifar100(paths):
    """``_lt``: VRM's longer schedule, its Tab. 15."""
    for path in paths:
        cfg = config(path)
        light, solver = cfg.DISTILLER.STUDENT in LIGHT, cfg.SOLVER
        rate, epochs = (0.01 if light else 0.05), 240
        if path.parent.name == "mlkd":  # its authors' recipe
            shuffle_from_resnet = path.stem in ("res32x4_shuv1", "res32x4_shuv2")
            rate, epochs = (0.01, 960 if shuffle_from_resnet else 480) if light else (0.025, 240)
        if path.parent.name == "crcd":  # its author's code; the last ten are on the labels alone
            epochs = 250
        if path.parent.name == "mdr":  # its paper names no exception
            rate = 0.05
        assert rate == solver.LR, short(path)
        fixed = (solver.WEIGHT_DECAY, solver.MOMENTUM, solver.BATCH_SIZE, solver.TYPE)
        assert fixed == (5e-4, 0.9, 64, "SGD"), short(path)
        schedule = (360, [150, 180, 210, 270]) if path.parent.name.endswith("_lt") else (epochs, [150, 180, 210])
        assert schedule == (solver.EPOCHS, solver.LR_DECAY_STAGES), short(path)
        assert solver.LR_DECAY_RATE == 0.1, short(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("crd/r34_r18", (100, 256, 0.1, "SGD", 1e-4, "step", 0.0, 0.0, 0, False, "none")),
        ("dist/r34_r18", (100, 256, 0.1, "SGD", 1e-4, "step", 0.0, 0.0, 0, True, "norm_bias")),
        ("dist_plus/r34_r18", (100, 256, 0.1, "SGD", 1e-4, "step", 0.0, 0.0, 0, True, "norm_bias")),
        ("dist_plus_b2/r50_r18", (450, 768, 0.048, "RMSProp", 1e-5, "exponential", 0.1, 0.9999, 2, False, "norm_bias")),
        ("dist_plus_b3/r50_r18", (300, 1024, 5e-4, "AdamW", 5e-2, "cosine", 0.1, 0.0, 2, False, "model")),
    ],
    ids=["B1", "B1 of DIST", "B1 of DIST+", "B2", "B3"],
)
def test_the_strategies_of_dist_plus(name, expected):
    """Tab. 2, and what the authors' trainers do besides."""
    cfg = config(CONFIGS / "imagenet" / f"{name}.yaml")
    solver, data = cfg.SOLVER, cfg.DATASET
    found = (solver.EPOCHS, solver.BATCH_SIZE, solver.LR, solver.TYPE, solver.WEIGHT_DECAY, solver.LR_SCHEDULE)
    found += (data.LABEL_SMOOTHING, solver.EMA_DECAY, data.RANDAUGMENT, solver.NESTEROV, solver.NO_DECAY)
    assert found == expected
    assert bool(data.RANDOM_ERASING) == bool(data.RANDAUGMENT)
    assert bool(data.MIXUP_ALPHA and data.CUTMIX_ALPHA and data.COLOR_JITTER) == (solver.TYPE == "AdamW")


def test_no_two_configs_share_a_folder():
    folders = [experiment_name(config(path)) for path in PAIR_FILES + METHOD_FILES]
    assert len(set(folders)) == len(folders)


def test_the_config_that_trains_a_network_may_inherit_its_name(tmp_path, monkeypatch):
    """Else a missing teacher's message does not say how to train it."""
    folder = tmp_path / "configs" / "digits" / "vanilla"
    folder.mkdir(parents=True)
    write(folder / "_method_.yaml", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet20"})
    write(folder / "other.yaml", _BASE_="_method_.yaml", DISTILLER={"STUDENT": "resnet8"})
    write(folder / "res20.yaml", _BASE_="_method_.yaml", EXPERIMENT={"TAG": "a"})
    monkeypatch.chdir(tmp_path)
    assert training_recipe("digits", "resnet20") == Path("configs/digits/vanilla/res20.yaml")
    assert training_recipe("digits", "resnet110") is None


def test_mdistillers_file_names_are_one_line_children():
    children = [path for path in FILES if path not in PAIR_FILES + METHOD_FILES]
    assert children
    for path in children:
        assert path.read_text() == f'_BASE_: "{path.stem}/{Path(yaml.safe_load(path.read_text())["_BASE_"]).name}"\n'


def test_every_network_of_the_configs_builds():
    networks = set()
    for cfg in map(config, FILES):
        networks |= {(cfg.DATASET.TYPE, cfg.DISTILLER.STUDENT), (cfg.DATASET.TYPE, cfg.DISTILLER.TEACHER)}
    for dataset, name in sorted(networks):
        with torch.device("meta"):  # shapes without memory
            network = build_student(load_config(options=["DATASET.TYPE", dataset, "DISTILLER.STUDENT", name]), 7)
        *_, last = network.parameters()
        assert last.shape[0] == 7, (dataset, name)


def test_a_config_of_an_earlier_run_merges(tmp_path, capsys):
    """Its file holds every key of its day, of all methods."""
    retired = {"DCD": {"INIT_B": -3.0}, "DIST": {"LABEL_SMOOTHING": 0.0}, "MDR": {"REDUCTION": "mean"}}
    path = write(tmp_path / "config.yaml", **retired, LOG={"SAVE_EVERY_MINUTES": 5.0})
    cfg = load_config(path)
    assert "INIT_B" not in cfg.DCD and "SAVE_EVERY_MINUTES" not in cfg.LOG
    assert "LOG.SAVE_EVERY_MINUTES 5.0 was removed: set LOG.SAVE_EVERY_STEPS" in capsys.readouterr().out
    path = write(tmp_path / "config.yaml", DIST={"LABEL_SMOOTHING": 0.1})
    with pytest.raises(InputError, match=r"DIST\.LABEL_SMOOTHING 0\.1 was removed: set DATASET"):
        load_config(path)
