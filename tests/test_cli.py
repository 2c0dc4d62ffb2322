"""The commands of ``tools/``: what they refuse and how, and what a run leaves.

Belongs here: arguments, messages, exit codes and files of a command; not the numbers that a run computes.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_runner import ROOT, run_tool
from mini_cifar import write_mini_cifar100
from plugin_files import forgotten

from mdistiller.dataset import dataset_dict
from mdistiller.distillers import distiller_dict
from mdistiller.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

# 40 images in two steps, with the last epoch evaluated on digits' 539 test images.
TINY = "DATASET.TRAIN_PER_CLASS 4 SOLVER.BATCH_SIZE 20 SOLVER.EPOCHS 2 LOG.EVAL_FREQ 1 SOLVER.DEVICE cpu"
PLAIN = f"--cfg configs/digits/vanilla/res8.yaml {TINY}"
KD = f"--cfg configs/digits/kd/res20_res8.yaml {TINY} DISTILLER.TEACHER resnet8"
VRM = f"--cfg configs/digits/vrm/res20_res8.yaml {TINY} DISTILLER.TEACHER resnet14 DISTILLER.TEACHER_CKPT resnet14"
FIRST = Path("output/digits/first")

LISTED = """
from mdistiller.distillers import Vanilla, register_distiller
from mdistiller.options import Option

@register_distiller("LISTED", {"SHARPNESS": Option(3.0, "of the listing")})
class Listed(Vanilla):
    pass
"""
PLAN = "TITLE: a\nOUTPUT: output/a\nSEEDS: [0]\nPAIRS: {p: }\n"
YAML_FILES = {
    "plain.py": "",
    "listed.py": LISTED,
    "broken.yaml": "SOLVER: [1",
    "solver_only.yaml": "SOLVER: {LR: 0.1}",
    "empty_base.yaml": "_BASE_:",
    "deep.yaml": "SOLVER: {LR: " + "[" * 3000 + "]" * 3000 + "}",
    "digits.yaml": "SOLVER: {LR: 1" + "0" * 5000 + "}",
    "hex_epochs.yaml": "SOLVER: {EPOCHS: 0x1" + "0" * 5000 + "}",
    "hex.yaml": "SOLVER: {LR: 0x1" + "0" * 5000 + "}",
    "list.yaml": "- SOLVER",
    "twice.yaml": "SOLVER: {LR: 0.1}\nDATASET: {TYPE: digits}\nSOLVER: {EPOCHS: 2}",
    "cycle_a.yaml": "_BASE_: cycle_b.yaml",
    "cycle_b.yaml": "_BASE_: cycle_a.yaml",
    "orphan.yaml": "_BASE_: cycle_c.yaml",
    "base_is_a_number.yaml": "_BASE_: 5",
    "empty_section.yaml": "SOLVER:",
    "unknown_key.yaml": "SOLVER: {LEARNING_RATE: 0.1}",
    "section_is_a_number.yaml": "SOLVER: 5",
    "plan_unknown_key.yaml": "TITLES: a",
    "plan_lacking.yaml": "TITLE: a",
    "plan_outside.yaml": PLAN.replace("output/a", "../../x") + "METHODS: {M: {CONFIG: c}}",
    "plan_kind.yaml": "SEEDS: 3",
    "plan_claim.yaml": PLAN + "METHODS: {M: {CONFIG: c}}\nCLAIMS: [[M, N]]",
    "plan_claim_of_lists.yaml": PLAN + "METHODS: {M: {CONFIG: c}}\nCLAIMS: [[[M], M]]",
    "plan_limit.yaml": PLAN + "METHODS: {M: {CONFIG: c}}\nCLAIMS: [[M, M, near]]",
    "plan_method.yaml": PLAN + "METHODS: {M: {CFG: c}}",
    "plan_config.yaml": PLAN + "METHODS: {M: {CONFIG: 'configs/{pair}.yaml'}}",
    "plan_braces.yaml": PLAN + "METHODS: {M: {CONFIG: c}}\nHOW_TO_READ: '{n}'",
    "plan_nowhere.yaml": PLAN.replace("output", "pipe") + "METHODS: {M: {CONFIG: configs/digits/vanilla/res8.yaml}}",
    "plan_bomb.yaml": PLAN + "METHODS: {M: {CONFIG: c}}\nHOW_TO_READ: '{images:x>99999999999}'",
    "plan_no_name.yaml": PLAN + "METHODS: {'': {CONFIG: c}}",
    "plan_option.yaml": PLAN + "METHODS: {M: {CONFIG: configs/digits/vanilla/res8.yaml}}\nOPTIONS: {SOLVER.LRX: 1}",
    "plan_same_folder.yaml": PLAN + "METHODS: {'M, 2': &same {CONFIG: configs/digits/vanilla/res8.yaml}, M 2: *same}",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A user's folder: ``configs``, one run in ``output/digits/first``, and invalid files."""
    place = tmp_path_factory.mktemp("workspace")
    (place / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    for name, text in YAML_FILES.items():
        (place / name).write_text(text)
    (place / "tower").mkdir()
    for floor in range(52):
        (place / "tower" / f"{floor}.yaml").write_text(f"_BASE_: {floor + 1}.yaml")
    os.mkfifo(place / "pipe")
    (place / "loop.yaml").symlink_to("loop.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        succeed("train", f"{PLAIN} EXPERIMENT.NAME first LOG.SAVE_CHECKPOINT_FREQ 1")

    whole = (place / FIRST / "student_last").read_bytes()
    (place / "truncated").write_bytes(whole[: len(whole) // 2])
    (place / "flipped").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=100).state_dict()}, place / "hundred_classes")
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, place / "resnet14")
    diverged = cifar_model_dict["resnet8"][0](num_classes=10).state_dict()
    diverged["conv1.weight"][0] = float("nan")
    torch.save({"model": diverged}, place / "not_finite")
    (place / "empty").touch()
    torch.save({"weights": [1.0]}, place / "no_state_dict")
    (place / "output" / "digits" / "notes").mkdir()
    (place / "output" / "digits" / "notes" / "diary.txt").write_text("no run")
    without_latest = shutil.copytree(place / FIRST, place / "output" / "digits" / "without_latest")
    for file in without_latest.glob("latest*"):
        file.unlink()
    for name, files in {"damaged": ["latest", "latest_previous"], "unreadable": ["config.yaml"]}.items():
        folder = shutil.copytree(place / FIRST, place / "output" / "digits" / name)
        for file in files:
            (folder / file).write_bytes(b"SOLVER: [1")
    return place


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    with forgotten():
        yield


def succeed(tool: str, command: str) -> str:
    """Run a command that must succeed, and return its output."""
    outcome = run_tool(tool, shlex.split(command))
    assert outcome.code == 0, outcome
    return outcome.out


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def metrics_of(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot() -> dict[str, tuple[int, bytes]]:
    """Everything below the current folder, files with the time of their last change and their content."""
    found = {}
    for folder, _, names in os.walk("."):
        found[folder] = (0, b"")
        for path in (Path(folder) / name for name in names):
            found[str(path)] = (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


# Command, and a part of its message.
REFUSED = [
    # the command line
    ("train", "SOLVER.BATHC_SIZE 5", "unknown config key 'SOLVER.BATHC_SIZE'; closest: SOLVER.BATCH_SIZE"),
    ("train", "LR 0.1", "unknown config key 'LR'; closest: SOLVER.LR"),
    ("train", "DISTILER.TYPE KD", "unknown config key 'DISTILER.TYPE'; closest: DISTILLER.TYPE"),
    ("train", "XYZZY 5", "unknown config key 'XYZZY'; sections: EXPERIMENT, DATASET"),
    ("train", "SOLVER.LR", "options come in pairs KEY VALUE; 'SOLVER.LR' has no value"),
    ("train", "SOLVER.LR=0.1", "'SOLVER.LR=0.1' has no value (write SOLVER.LR 0.1)"),
    ("train", "SOLVER 5", "SOLVER must hold keys, not 5"),
    ("train", "SOLVER.EPOCHS many", "SOLVER.EPOCHS takes a whole number (default 240), got 'many'"),
    ("train", "SOLVER.EPOCHS 2.5", "SOLVER.EPOCHS takes a whole number (default 240), got 2.5"),
    ("train", "SOLVER.EPOCHS True", "SOLVER.EPOCHS takes a whole number"),
    ("train", "SOLVER.LR True", "SOLVER.LR takes a finite number (default 0.05), got True"),
    ("train", "SOLVER.LR nan", "SOLVER.LR takes a finite number (default 0.05), got 'nan'"),
    ("train", "LOG.WANDB 3", "LOG.WANDB takes True or False"),
    ("train", "--resume --overwrite", "not allowed with argument"),
    ("train", "", "no configuration is given: nothing says what to train; for example: python tools/train.py --cfg"),
    ("train", "SOLVER.LR 0.1", "nothing says what to train"),
    ("train", "--cfg solver_only.yaml", "solver_only.yaml names neither data nor networks: nothing says"),
    ("train", "--cfg empty_base.yaml", "empty_base.yaml names neither data nor networks: nothing says"),
    ("train", "configs/digits/kd/res20_res8.yaml", "to read a configuration file, write --cfg configs/digits/kd/res"),
    ("train", "--cfg list.yaml --cfg twice.yaml", "--cfg is given twice, list.yaml and twice.yaml; give it once"),
    ("train", "--cfg ''", "'' is no path"),
    ("train", "--cfg loop.yaml", "'loop.yaml' is no path: "),
    ("train", "--cfg hex_epochs.yaml", "SOLVER.EPOCHS takes a whole number (default 240), got a number of very many"),
    ("train", "--cfg pipe", "cannot read pipe: it is no regular file"),
    ("train", "--cfg deep.yaml", "cannot read deep.yaml: its lists or keys are nested too deeply"),
    ("train", "--cfg digits.yaml", "cannot read digits.yaml: "),
    ("train", "--cfg hex.yaml", "SOLVER.LR takes a finite number (default 0.05), got a number of very many digits"),
    ("train", "--cfg tower/0.yaml", "tower/0.yaml is more than 50 files deep"),
    ("train", "--forward", "unrecognized arguments: --forward"),
    # files
    ("train", "--cfg configs/digits/kd/res20_res9.yaml", "no config file configs/digits/kd/res20_res9.yaml; in",
     "closest: res20_res8.yaml"),
    ("train", "--cfg config/kd.yaml", "no config file config/kd.yaml; there is no folder config (current folder: /"),
    ("train", "--cfg configs", "cannot read configs: it is a folder; name a file"),
    ("train", "--cfg broken.yaml", "cannot read broken.yaml", "line 1"),
    ("train", "--cfg list.yaml", "config file list.yaml must hold keys, not list"),
    ("train", "--cfg twice.yaml", "cannot read twice.yaml: key 'SOLVER' stands twice"),
    ("train", "--cfg cycle_a.yaml", "inherits from itself: cycle_a.yaml -> cycle_b.yaml -> cycle_a.yaml"),
    ("train", "--cfg orphan.yaml", "no config file cycle_c.yaml (the _BASE_ of orphan.yaml)", "cycle_a.yaml"),
    ("train", "--cfg base_is_a_number.yaml", "_BASE_ takes a file or a list of files, got 5"),
    ("train", "--cfg empty_section.yaml", "SOLVER must hold keys, and is empty"),
    ("train", "--cfg section_is_a_number.yaml", "section_is_a_number.yaml: SOLVER must hold keys, not 5"),
    ("train", "--cfg unknown_key.yaml", "unknown_key.yaml: unknown config key 'SOLVER.LEARNING_RATE'"),
    ("train", "DISTILLER.TYPE NONE DISTILLER.ADD_KD 1", "DISTILLER.ADD_KD 1.0 needs a teacher, and NONE has none"),
    # names
    ("train", "DISTILLER.TYPE kd", "DISTILLER.TYPE: no distiller named 'kd'; closest: KD"),
    ("train", "DATASET.TYPE digit", "DATASET.TYPE: no data set named 'digit'; closest: digits"),
    ("train", f"{PLAIN} DISTILLER.STUDENT resnet9", "DISTILLER.STUDENT: no CIFAR model named 'resnet9'; closest: "),
    ("train", f"{KD} DISTILLER.TEACHER resnet9", "DISTILLER.TEACHER: no CIFAR model named 'resnet9'; closest: resnet8"),
    ("train", "SOLVER.TYPE sgd", "SOLVER.TYPE: no choice named 'sgd'; closest: SGD; known: AdamW, RMSProp, SGD"),
    ("train", "SOLVER.LR_SCHEDULE cos", "SOLVER.LR_SCHEDULE: no choice named 'cos'; closest: cosine"),
    ("train", "SOLVER.AMP fp8", "SOLVER.AMP: no choice named 'fp8'; closest: fp16"),
    ("train", "SOLVER.TRAINER bass", "SOLVER.TRAINER: no trainer named 'bass'; closest: base"),
    ("train", "SOLVER.LR_RULE root", "SOLVER.LR_RULE: no choice named 'root'; closest: sqrt"),
    ("train", "DATASET.VIEW_STRONG medium", "DATASET.VIEW_STRONG: data set cifar100 has no recipe 'medium'", "strong"),
    ("train", f"{KD} SOLVER.CACHE_TEACHER True DATASET.RANDAUGMENT 1", "SOLVER.CACHE_TEACHER needs equal images in",
     "change the images: DATASET.RANDAUGMENT 1, DATASET.VIEW_WEAK weak (the same in every epoch: plain)"),
    ("train", f"{KD} DISTILLER.TYPE OFD DISTILLER.TEACHER resnet14 DISTILLER.TEACHER_CKPT resnet14 DATASET.VIEW_WEAK "
     "plain SOLVER.CACHE_TEACHER True", "SOLVER.CACHE_TEACHER: OFD runs its teacher on the statistics of the batch"),
    ("train", "LOG.PROGRESS bar", "LOG.PROGRESS: no choice named 'bar'; known: auto, off, on"),
    # values
    ("train", "SOLVER.LR -1", "SOLVER.LR must be above 0, got -1"),
    ("train", "SOLVER.BATCH_SIZE -1", "SOLVER.BATCH_SIZE must be at least 1, got -1"),
    ("train", "SOLVER.EPOCHS 0", "SOLVER.EPOCHS must be at least 1 and at most 1000000, got 0"),
    ("train", "SOLVER.WEIGHT_DECAY -0.1", "SOLVER.WEIGHT_DECAY must be at least 0, got -0.1"),
    ("train", "SOLVER.MOMENTUM 1", "SOLVER.MOMENTUM must be at least 0 and below 1, got 1.0"),
    ("train", "SOLVER.BETAS '[0.9]'", "SOLVER.BETAS must be two numbers"),
    ("train", "DATASET.TRAIN_FRACTION 0", "DATASET.TRAIN_FRACTION must be above 0"),
    ("train", f"{PLAIN} SOLVER.LR_DECAY_STAGES '[30, -2, 10]'", "SOLVER.LR_DECAY_STAGES must be rising, at least 1"),
    ("train", f"{PLAIN} SOLVER.LR_SCHEDULE cosine SOLVER.LR_MIN 3", "SOLVER.LR_MIN must be at most SOLVER.LR 0.05"),
    ("train", f"{PLAIN} SOLVER.DEVICE cpu:5", "SOLVER.DEVICE 'cpu:5' cannot be used here: there is one CPU device"),
    ("train", f"{PLAIN} EXPERIMENT.NAME .", "EXPERIMENT.NAME '.' must lie below LOG.PREFIX"),
    ("train", f"{PLAIN} SOLVER.DEVICE meta", "SOLVER.DEVICE 'meta' cannot be used here"),
    ("train", f"{PLAIN} EXPERIMENT.NAME /tmp/x", "EXPERIMENT.NAME '/tmp/x' must lie below LOG.PREFIX"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT nowhere KD.LOSS.KD_WEIGHT -1", "KD.LOSS.KD_WEIGHT must be at least 0"),
    ("train", "EXPERIMENT.SEED -1", "EXPERIMENT.SEED must be at least 0"),
    ("train", "SOLVER.EPOCHS 5 SOLVER.WARMUP_EPOCHS 5", "SOLVER.WARMUP_EPOCHS is 5, which leaves no epoch"),
    ("train", "EXPERIMENT.TAG ''", "EXPERIMENT.NAME and EXPERIMENT.TAG are both empty"),
    ("train", f"{PLAIN} SOLVER.NESTEROV True SOLVER.MOMENTUM 0", "SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0"),
    ("train", f"{PLAIN} SOLVER.DEVICE warp", "SOLVER.DEVICE 'warp' cannot be used here", "; use auto or cpu"),
    ("train", f"{PLAIN} SOLVER.AMP fp16", "SOLVER.AMP fp16 needs a GPU; on the CPU use SOLVER.AMP bf16"),
    ("train", f"{PLAIN} DATASET.LABEL_SMOOTHING 1", "DATASET.LABEL_SMOOTHING must be at least 0 and below 1, got 1"),
    ("train", f"{PLAIN} DATASET.RANDOM_ERASING 2", "DATASET.RANDOM_ERASING must be at least 0 and at most 1, got 2"),
    ("train", f"{VRM} VRM.METRIC cosine VRM.RELATION gram", "VRM.METRIC cosine compares unit edges", "choose mse"),
    ("train", f"{VRM} VRM.RELATION angle VRM.EDGE_NORM False", "VRM.RELATION angle", "EDGE_NORM must be True"),
    ("train", f"{VRM} VRM.LOCATION pooled VRM.VERTEX_WEIGHT 1", "VRM.VERTEX_WEIGHT compares predictions", "logits"),
    ("train", f"{VRM} DISTILLER.TYPE VRM_ONE_VIEW VRM.GRAPH raw", "VRM.GRAPH raw needs two views", "TYPE VRM"),
    # data
    ("train", f"{PLAIN} SOLVER.BATCH_SIZE 1", "BatchNorm", "SOLVER.BATCH_SIZE, at least 2"),
    ("train", f"{PLAIN} SOLVER.BATCH_SIZE 39", "the last batch of an epoch holds a single image (40 training images",
     "SOLVER.DROP_LAST True"),
    ("train", f"{PLAIN} SOLVER.BATCH_SIZE 64 SOLVER.DROP_LAST True", "SOLVER.DROP_LAST leaves none of 40"),
    ("train", f"{PLAIN} DATASET.VAL_FRACTION 0.001", "DATASET.VAL_FRACTION=0.001 holds out 0 of the 122"),
    ("train", f"{PLAIN} DATASET.TRAIN_PER_CLASS 500", "DATASET.TRAIN_PER_CLASS=500, but the smallest class has 122"),
    ("train", f"{PLAIN} DATASET.TRAIN_FRACTION 0.5", "are both set"),
    ("train", "DATASET.ROOT nowhere DATASET.DOWNLOAD False", "nowhere/cifar-100-python/train is missing",
     "https://www.cs.toronto.edu/~kriz/cifar.html"),
    # the teacher
    ("train", f"{KD} DISTILLER.TEACHER_CKPT output/none", "DISTILLER.TEACHER_CKPT output/none does not exist",
     "train it: python tools/train.py --cfg configs/digits/vanilla/res8.yaml", "name another file"),
    ("train", "--cfg configs/cifar100/kd/res56_res20.yaml DISTILLER.TEACHER_CKPT none", "get it: ",
     "train it: python tools/train.py --cfg configs/cifar100/vanilla/res56.yaml"),
    ("train", f"{KD} DISTILLER.TEACHER resnet110 DISTILLER.TEACHER_CKPT ''", "teacher resnet110 has no public",
     "train it: python tools/train.py DISTILLER.STUDENT resnet110 DATASET.TYPE digits"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT hundred_classes", "checkpoint hundred_classes for teacher resnet8 has 100 "
     "classes, not the 10 of data set digits; train a teacher on these classes (DISTILLER.STUDENT "
     "resnet8), write a file that names its outputs"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT resnet14", "checkpoint resnet14 for teacher resnet8 does not fit",
     "not in the model: layer1.1", "name the network that it was trained as: resnet14 with 10 classes fits"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT not_finite", "checkpoint not_finite for teacher resnet8 has values that "
     "are not finite, in conv1.weight: "),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT empty", "checkpoint empty is damaged: the file is empty; copy or "),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT truncated", "checkpoint truncated is damaged"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT flipped", "checkpoint flipped is damaged", "checksum"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT broken.yaml", "checkpoint broken.yaml is damaged or no checkpoint (",
     "; copy or download it again"),
    ("train", "DISTILLER.PLUGINS broken.yaml", "no method file ", "DISTILLER.PLUGINS takes Python files (.py)"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT no_state_dict", "holds no state dict under 'model'; found: ['weights']"),
    ("train", f"{KD} DISTILLER.TEACHER_CKPT {FIRST}", f"checkpoint {FIRST} is a folder; use {FIRST}/student_last"),
    # the run's folder
    ("train", f"{PLAIN} LOG.PREFIX broken.yaml", "cannot write to broken.yaml/digits/vanilla,res8", "LOG.PREFIX"),
    ("train", f"{PLAIN} EXPERIMENT.NAME {'n' * 300}", "is too long: at most 200 bytes between two '/'"),
    ("train", f"{PLAIN} EXPERIMENT.NAME first", "output/digits/first holds a run already", "--resume", "--overwrite"),
    ("train", f"{PLAIN} EXPERIMENT.NAME notes", "output/digits/notes exists and is no run's folder"),
    ("train", f"{PLAIN} EXPERIMENT.NAME notes --overwrite", "output/digits/notes exists and is no run's folder"),
    ("train", f"{PLAIN} EXPERIMENT.NAME first --resume SOLVER.BATCH_SIZE 10 EXPERIMENT.SEED 1", "another experiment",
     "SOLVER.BATCH_SIZE was 20, is 10", "EXPERIMENT.SEED was 0, is 1"),
    ("train", f"{PLAIN} EXPERIMENT.NAME first --resume SOLVER.EPOCHS 1", "has trained 2 epochs",
     "SOLVER.EPOCHS is 1"),
    ("train", f"{PLAIN} EXPERIMENT.NAME damaged --resume SOLVER.EPOCHS 3", "cannot resume: ",
     "damaged/latest is damaged or no checkpoint", "; and "),
    ("train", f"{PLAIN} EXPERIMENT.NAME without_latest --resume", "holds a finished run without its file latest"),
    ("train", f"{PLAIN} EXPERIMENT.NAME unreadable --resume", "cannot read output/digits/unreadable/config.yaml"),
    # the other commands
    ("eval", "", "the following arguments are required: -m/--model"),
    ("eval", "-m resnet9 -d digits", "error: no CIFAR model named 'resnet9'; closest: resnet8"),
    ("eval", "-m resnet8 -d digit", "DATASET.TYPE: no data set named 'digit'; closest: digits"),
    ("eval", "-m resnet8 -d digits", "teacher resnet8 has no public checkpoint for digits and -c names no file",
     "or name another file with -c FILE"),
    ("eval", "-m resnet14 -d digits -c resnet14 --against resnet8", "or name another file with --against-ckpt FILE"),
    ("eval", "-m resnet14 -c resnet14", "model resnet14 has 10 classes, not the 100 of data set cifar100; ",
     "name the data set that it was trained on with -d"),
    ("eval", f"-m resnet8 -d digits -c {FIRST}", f"checkpoint {FIRST} is a folder; use {FIRST}/student_last"),
    ("eval", "-m resnet8 -d digits -c configs", "checkpoint configs is a folder; name a file in it"),
    ("eval", "-m resnet8 -d digits -c nothing", "no checkpoint nothing"),
    ("eval", "-m resnet8 -d digits -c truncated", "checkpoint truncated is damaged"),
    ("eval", "-m resnet8 -d digits -c resnet14", "checkpoint resnet14 for model resnet8 does not fit"),
    ("eval", "-m resnet14 -d digits -c resnet14 --against resnet9", "error: no CIFAR model named 'resnet9'"),
    ("eval", "-m resnet8 -d digits -c resnet14 -bs 0", "DATASET.TEST.BATCH_SIZE must be at least 1, got 0"),
    ("eval", "-m resnet8 -d digits -c resnet14 SOLVER.DEVICE", "'SOLVER.DEVICE' has no value"),
    ("eval", "-m resnet14 -d digits -c resnet14 --against-ckpt resnet8", "--against-ckpt without --against would"),
    ("list", "model", "no list named 'model'; closest: models"),
    ("list", "methods VRMM", "nothing in the list of methods matches 'VRMM'; closest: VRM"),
    ("list", "options broken.py", "no method file "),
    ("list", "options plain.py", "plain.py declares no options (DEFAULTS)"),
    ("list", "--page docs/methods.md methods", "--page writes a page and lists nothing"),
    ("list", "--page nowhere/page.md", "--page: cannot write nowhere/page.md: there is no folder nowhere"),
    ("views", "-d digits -o configs", "-o: cannot write configs: it is a folder; name a file in it"),
    ("list", "--page /proc/options.md", "--page: cannot write /proc/options.md: "),
    ("list", "--page pipe", "--page: cannot write pipe: it is no regular file"),
    ("bench", "train --variants bf17", "no variant named 'bf17'; closest: bf16; known: bf16; bf16, cached tea"),
    ("bench", "step --json nowhere/a.json", "--json: cannot write nowhere/a.json: there is no folder nowhere"),
    ("reproduce", "--plan configs/plans/demo.yaml --report list.yaml/a.md", "there is no folder list.yaml"),
    ("reproduce", "", "the following arguments are required: --plan"),
    ("reproduce", "--plan configs/plans/demonstration.yaml", "no plan configs/plans/demonstration.yaml", "demo.yaml"),
    ("reproduce", "--plan configs/plans/demo.yaml --jobs -1", "the number of jobs must be 0 or more, got -1"),
    ("reproduce", "--plan broken.yaml", "cannot read broken.yaml"),
    ("reproduce", "--plan list.yaml", "plan list.yaml: the file must hold the keys TITLE, OUTPUT, SEEDS"),
    ("reproduce", "--plan plan_unknown_key.yaml", "plan plan_unknown_key.yaml: unknown key TITLES; closest: TITLE"),
    ("reproduce", "--plan plan_outside.yaml", "OUTPUT '../../x' must not lead out of the current folder"),
    ("reproduce", "--plan plan_lacking.yaml", "the file lacks OUTPUT, SEEDS, PAIRS, METHODS"),
    ("reproduce", "--plan plan_kind.yaml", "SEEDS takes a list, not 3"),
    ("reproduce", "--plan plan_claim.yaml", "the largest difference in points, not ['M', 'N']"),
    ("reproduce", "--plan plan_claim_of_lists.yaml", "the largest difference in points, not [['M'], 'M']"),
    ("reproduce", "--plan plan_limit.yaml", "the largest difference in points, not ['M', 'M', 'near']"),
    ("reproduce", "--plan plan_method.yaml", "METHODS: 'M' must", "hold CONFIG"),
    ("reproduce", "--plan plan_config.yaml", "M, p: no config file configs/p.yaml"),
    ("reproduce", "--plan plan_braces.yaml", "HOW_TO_READ may hold {images} and {image_points}"),
    ("reproduce", "--plan plan_nowhere.yaml", "cannot write"),
    ("reproduce", "--plan plan_bomb.yaml", "HOW_TO_READ may hold {images} and {image_points}"),
    ("reproduce", "--plan plan_no_name.yaml", "METHODS: '' must be a name and hold CONFIG"),
    ("reproduce", "--plan plan_option.yaml", "M, p: OPTIONS: unknown config key 'SOLVER.LRX'"),
    ("reproduce", "--plan plan_same_folder.yaml", "'M, 2' and 'M 2' on p share the folder output/a/M_2/p/seed0"),
]  # fmt: skip


def case(tool, command, *fragments):
    return pytest.param(tool, command, fragments, id=f"{tool} {command.split(TINY)[-1].strip()}"[:80])


@pytest.mark.parametrize(("tool", "command", "fragments"), [case(*row) for row in REFUSED])
def test_bad_input_ends_with_one_message_and_changes_nothing(tool, command, fragments):
    before = snapshot()
    outcome = run_tool(tool, shlex.split(command))
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    for fragment in fragments:
        assert fragment in outcome.err
    assert snapshot() == before


def test_options_that_this_run_does_not_read_are_taken_and_named():
    out = succeed("train", f"{PLAIN} EXPERIMENT.NAME unread VRM.ALPHA 1 SOLVER.LR_MIN 0.1 SOLVER.BATCH_SIZE 500")
    assert "without effect here: VRM.ALPHA (DISTILLER.TYPE is NONE), SOLVER.LR_MIN (given the other settings)\n" in out
    assert "SOLVER.BATCH_SIZE is 500: all 40 training images are one batch\n" in out
    config = out[out.index("CONFIG") : out.index("Epoch 1")]
    assert "EPOCHS: 2\n" in config and config.count("\n") < 50
    assert not re.search("TEACHER|SHAPES|BETAS|VIEW_STRONG|RANDAUGMENT|DOT|VRM", config)
    assert re.search(r"\| [\d,]+ images/s\| \d:\d\d:\d\d left\n", out)
    assert re.search(r"Last: .*\| \d:\d\d:\d\d of training and evaluation\| files in output/digits/unread\n", out)


def test_a_real_process_ends_with_code_2_and_without_a_traceback():
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--cfg", "orphan.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no config file cycle_c.yaml")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_diverging_run_ends_with_code_1_and_says_what_is_left(epochs):
    folder = Path(f"output/digits/diverging_after_{epochs}")
    if epochs:
        shutil.copytree(FIRST, folder)
    outcome = run_tool(
        "train", shlex.split(f"{PLAIN} EXPERIMENT.NAME {folder.name} --resume SOLVER.EPOCHS 4 SOLVER.LR 1e30")
    )
    assert outcome.code == 1
    assert outcome.err.startswith(f"stopped: the loss is not finite at step {2 * epochs + 2} (epoch {epochs + 1}): ce ")
    assert (f"{folder}/latest holds the last good state" in outcome.err) == bool(epochs)


def test_whoever_stops_reading_is_not_shown_a_traceback():
    """``tools/list.py | head -1`` once ended in a BrokenPipeError."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tools' / 'list.py'))} | head -c 6"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("METHOD", "")


# What a run leaves in its folder.


def test_a_runs_folder_holds_these_files():
    assert {path.name for path in FIRST.iterdir()} == {
        "config.yaml", "environment.json", "classes.json", "metrics.csv", "worklog.txt", "results.json", "train.events",
        "latest", "latest_previous", "best", "epoch_1", "epoch_2",
        "student_latest", "student_best", "student_1", "student_2", "student_last",
    }  # fmt: skip


def test_environment_and_results():
    environment = json.loads((FIRST / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert (environment["device"], environment["seed"]) == ("cpu", 0)
    assert "EXPERIMENT.NAME first" in environment["command"]

    results = results_of(FIRST)
    facts = {"status": "finished", "experiment": "digits/first", "method": "NONE", "student": "resnet8", "seed": 0,
             "dataset": "digits", "training_images": 40, "images_seen": 80, "epochs": 2, "steps": 4}  # fmt: skip
    assert {key: results[key] for key in facts} == facts
    assert set(results) - set(facts) == {
        "last", "best", "mean_of_last", "seconds", "images_per_second", "extra_parameters", "method_file"
    }  # fmt: skip
    assert (results["last"]["epoch"], results["last"]["split"], results["last"]["images"]) == (2, "test", 539)
    assert results["best"]["top1"] == max(float(row["test_acc"]) for row in metrics_of(FIRST))
    assert set(results["seconds"]) == {"data", "train", "evaluation"}


def test_metrics_and_worklog_tell_the_same():
    rows, last = metrics_of(FIRST), results_of(FIRST)["last"]
    assert list(rows[0]) == [
        "epoch", "lr", "train_acc", "train_acc_top5", "train_loss", "loss/ce", "test_acc", "test_acc_top5", "test_loss"
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["test_acc"]) == last["top1"]
    assert float(rows[-1]["train_loss"]) == pytest.approx(float(rows[-1]["loss/ce"]))

    blocks = [
        f"{'-' * 25}\nepoch: {row['epoch']}\nlr: 0.05\n"
        + "".join(
            f"{key}: {float(row[key]):.2f}\n"
            for key in ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")
        )
        + f"{'-' * 25}\n"
        for row in rows
    ]
    best = results_of(FIRST)["best"]["top1"]
    assert (FIRST / "worklog.txt").read_text() == "".join(blocks) + f"best_acc\t{best:.2f}"


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars in TensorBoard files by tag and step; the files are records of (length, check, data, check)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_tensorboard_has_mdistillers_tags():
    scalars, rows = read_events(FIRST / "train.events"), metrics_of(FIRST)
    for tag in ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss", "lr"):
        assert scalars[tag] == pytest.approx({int(row["epoch"]): float(row[tag]) for row in rows})


def test_its_config_runs_again_and_gives_the_same():
    succeed("train", f"--cfg {FIRST}/config.yaml EXPERIMENT.NAME again")
    again = Path("output/digits/again")
    assert (again / "metrics.csv").read_text() == (FIRST / "metrics.csv").read_text()
    assert results_of(again)["last"] == results_of(FIRST)["last"]
    before, now = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (FIRST, again))
    before["EXPERIMENT"]["NAME"] = "again"
    assert before == now


def test_eval_gives_what_training_reported():
    out = succeed("eval", f"-m resnet8 -c {FIRST}/student_last -d digits -bs 100 SOLVER.DEVICE cpu")
    last = results_of(FIRST)["last"]
    assert out == (
        f"resnet8 on 539 test images of digits: top-1 {last['top1']:.2f}, top-5 {last['top5']:.2f}, "
        f"loss {last['loss']:.4f}\n"
    )


def test_eval_compares_two_networks():
    command = f"-m resnet8 -c {FIRST}/student_last -d digits -bs 100 SOLVER.DEVICE cpu"
    alone = succeed("eval", command)
    same = succeed("eval", f"{command} --against resnet8 --against-ckpt {FIRST}/student_last")
    assert same.startswith(alone)
    assert "target-class consistency 1.0000, non-target-class consistency 1.0000" in same
    assert same.count("pearson 1.0000, spearman 1.0000, kendall 1.0000") == 2
    other = succeed("eval", f"{command} --against resnet14 --against-ckpt resnet14")
    assert "against resnet14: target-class consistency 0." in other and "intra-class correlation: pearson" in other


def test_resume_goes_on_and_overwrite_starts_anew():
    """Options may stand before and after the flags."""
    longer = Path("output/digits/longer")
    shutil.copytree(FIRST, longer)
    out = succeed("train", f"EXPERIMENT.NAME longer --resume {PLAIN} SOLVER.EPOCHS 3")
    assert out.count("resuming although SOLVER.EPOCHS was 2, is 3") == 1
    assert [row["epoch"] for row in metrics_of(longer)] == ["1", "2", "3"]
    assert metrics_of(longer)[:2] == metrics_of(FIRST)
    assert (longer / "worklog.txt").read_text().count("best_acc") == 1
    assert sorted(read_events(longer / "train.events")["test_acc"]) == [1, 2, 3]
    assert (results_of(longer)["epochs"], results_of(longer)["images_seen"]) == (3, 120)

    (longer / "part_two").mkdir()  # may be another run: EXPERIMENT.NAME longer/part_two
    succeed("train", f"{PLAIN} SOLVER.EPOCHS 1 --overwrite EXPERIMENT.NAME longer")
    assert [row["epoch"] for row in metrics_of(longer)] == ["1"]
    assert sorted(read_events(longer / "train.events")["test_acc"]) == [1]
    assert not (longer / "epoch_2").exists()
    assert (longer / "part_two").is_dir()


def test_resume_starts_where_there_is_nothing_yet():
    out = succeed("train", f"{PLAIN} SOLVER.EPOCHS 1 EXPERIMENT.NAME fresh --resume")
    assert out.count("nothing to resume in output/digits/fresh; starting from the beginning") == 1


def test_a_teacher_is_scored_before_training():
    out = succeed("train", f"{KD} SOLVER.EPOCHS 1 DISTILLER.TEACHER_CKPT {FIRST}/student_last EXPERIMENT.PROJECT ''")
    results = results_of(Path("output/kd,res20,res8"))  # no project: no folder in between
    top1 = results_of(FIRST)["last"]["top1"]
    assert results["teacher"]["top1"] == top1
    assert f"Teacher resnet8 ({FIRST}/student_last): top-1 {top1:.2f}" in out


def test_with_a_validation_split_the_test_images_are_scored_once():
    succeed("train", f"{PLAIN} DATASET.VAL_FRACTION 0.1 EXPERIMENT.NAME validated")
    folder = Path("output/digits/validated")
    rows, results = metrics_of(folder), results_of(folder)
    assert not [key for key in rows[0] if key.startswith("test")]
    assert results["validation"]["last"]["top1"] == float(rows[-1]["val_acc"])
    assert results["validation"]["best"]["top1"] == max(float(row["val_acc"]) for row in rows)
    for name in ("last", "best"):
        assert (results[name]["split"], results[name]["images"]) == ("test", 539)
    assert results["best"]["picked_on"] == "validation"
    assert results["best"]["epoch"] == results["validation"]["best"]["epoch"]
    scored = succeed("eval", f"-m resnet8 -c {folder}/student_best -d digits SOLVER.DEVICE cpu")
    assert f"top-1 {results['best']['top1']:.2f}," in scored


def test_cifar100_from_files_with_a_committed_config():
    write_mini_cifar100(Path("data"), train_per_class=1, test_per_class=1)
    teacher = cifar_model_dict["resnet56"][0](num_classes=100)
    torch.save({"model": teacher.state_dict(), "epoch": 240}, "teacher.pth")
    succeed(
        "train",
        "--cfg configs/cifar100/kd/res56_res20.yaml DISTILLER.TEACHER_CKPT teacher.pth SOLVER.EPOCHS 1 "
        "DATASET.NUM_WORKERS 0 SOLVER.DEVICE cpu",
    )
    results = results_of(Path("output/cifar100_baselines/kd,res56,res20"))
    assert (results["training_images"], results["last"]["images"], results["steps"]) == (100, 100, 2)


def test_list_names_everything_there_is():
    out = succeed("list", "methods models datasets options configs plans")
    words = set(re.split(r"[\s(),]+", out))
    for table in (distiller_dict, dataset_dict, cifar_model_dict, tiny_imagenet_model_dict, imagenet_model_dict):
        assert set(table) <= words
    for path in ("cifar100/kd/res32x4_res8x4.yaml", "digits/vanilla/res8.yaml", "plans/demo.yaml"):
        assert f"configs/{path}" in words
    assert not any("/_" in word for word in words)  # bases
    assert succeed("list", "datasets models").startswith("DATA SET")
    assert "`" not in succeed("list", "methods")  # docstrings without their markup
    assert "MLKD (KD_ours)  logit " in out  # one row for a method


def test_an_overview_fits_a_page_and_says_how_to_see_more():
    out = succeed("list", "")
    assert out.count("\n") < 60 and max(map(len, out.splitlines())) <= 100
    for kind in ("methods", "models", "datasets", "options", "configs", "plans"):
        assert f"{kind.upper()}: python tools/list.py {kind} [" in out
    assert "KD_TWO_VIEWS" in out and "resnet32x4" in out and "configs/cifar100/ (" in out


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("methods kd", {"KD"}),  # which is called so
        ("methods KD vrm", {"KD", "VRM"}),
        ("methods kd_ours", {"MLKD"}),
        ("methods contrastive", {"CRD", "DCD", "NORM_CRD"}),
        ("datasets digits cifar100", {"digits", "cifar100"}),
        (
            "configs digits kd res8",
            {"configs/digits/kd/res20_res8.yaml", "configs/digits/kd_two_views/res20_res8.yaml"},
        ),
    ],
)
def test_lists_are_chosen_by_words(command, first):
    found = {line.split()[0] for line in succeed("list", command).split("\n")[1:] if line}
    assert found == first if "configs" not in command else first <= found


def test_options_of_a_method_file():
    out = succeed("list", "options listed.py")
    assert out.splitlines()[1].split()[:3] == ["LISTED.SHARPNESS", "3.0", "of"]
    assert succeed("list", "options LISTED") == out
