"""The command, on the torchvision engine: train, stop, resume, score; bad input."""

import csv
import json
import os
import re
import shutil
import signal

import pytest
import torch
from cli_runner import ROOT, run_script
from detectors import TINY, pictures
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN

from mdistiller.dense import dense_dict
from mdistiller.detection import cfg as config
from mdistiller.detection.networks import build_detector, load_start
from mdistiller.detection.trainer import DetectionTrainer, learning_rate
from mdistiller.engine.build import build_model
from mdistiller.engine.folder.checkpoint import load_checkpoint
from mdistiller.registry import InputError, imagenet_model_dict

SHORT = [*TINY, "SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "3"]


def train(*arguments, config="NONE", code=0):
    given = ["--engine", "torchvision", "--config-file", f"detection/configs/minicoco/{config}.yaml", *arguments]
    done = run_script(ROOT / "detection" / "train_net.py", given)
    assert done.code == code, done.out + done.err
    return done


@pytest.fixture(scope="module")
def teacher(small_minicoco, tmp_path_factory):
    """The folder of a teacher of four steps."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    os.environ["DETECTRON2_DATASETS"], before = str(small_minicoco), os.environ.get("DETECTRON2_DATASETS")
    try:
        train(*SHORT, "OUTPUT_DIR", folder, config="teacher")
    finally:
        os.environ.pop("DETECTRON2_DATASETS") if before is None else os.environ.update(DETECTRON2_DATASETS=before)
    return folder


def test_a_run_leaves_what_any_run_leaves(teacher):
    names = {path.name for path in teacher.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "results.json",
        "student_last",
        "latest",
        "pictures.png",
    } <= names
    results = json.loads((teacher / "results.json").read_text())
    assert (results["status"], results["steps"], results["engine"]) == ("finished", 4, "torchvision")
    assert {"AP", "AP50", "AP75", "epoch", "images", "split"} <= results["last"].keys()
    assert "APl" not in results["last"]  # there is no large object
    assert (results["last"]["images"], results["training_images"]) == (8, 24)
    with (teacher / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["3", "4"]  # TEST.EVAL_PERIOD 3 of MAX_ITER 4
    assert all(float(row["loss/loss_classifier"]) > 0 and row["test_AP"] for row in rows)
    cfg = config.load(teacher / "config.yaml")  # can be run again
    assert cfg.SOLVER.MAX_ITER == 4 and str(teacher) == cfg.OUTPUT_DIR
    stock = build_detector(cfg)
    assert type(stock) is FasterRCNN
    stock.load_state_dict(load_checkpoint(teacher / "student_last")["model"])


def test_the_score_of_a_finished_run(teacher):
    done = train("--eval-only", *SHORT, "OUTPUT_DIR", teacher, config="teacher")
    last = json.loads((teacher / "results.json").read_text())["last"]
    assert f"AP {last['AP']:.2f}, AP50 {last['AP50']:.2f}" in done.out
    other = teacher.parent / "other"
    shutil.copy(teacher / "student_last", other)
    done = train("--eval-only", *SHORT, "MODEL.WEIGHTS", other, config="teacher")
    assert f"AP {last['AP']:.2f}" in done.out


def what_a_run_leaves(folder):
    state = load_checkpoint(folder / "latest")
    state["hooks"].pop("Clock")
    state["results"].pop("seconds", None)
    state["results"].pop("experiment", None)
    state.pop("config")
    return state, (folder / "metrics.csv").read_bytes(), (folder / "worklog.txt").read_bytes()


def assert_equal(a, b, path=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}.{n}")
    else:
        assert a == b, path


class Killed(BaseException):
    pass


def options_with(teacher, *more):
    return [*SHORT, "TEACHER.OPTS", str([*TINY, "OUTPUT_DIR", str(teacher)]), "DISTILLER.TYPE", "DIST_PLUS", *more]


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(teacher, tmp_path, monkeypatch, how):
    """With a method that trains a part of the teacher and has modules of its own."""
    every_step = ("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "5")
    done = train(*options_with(teacher, *every_step), "OUTPUT_DIR", tmp_path / "whole", config="KD")
    assert f"Teacher Faster R-CNN R18 of width 8 ({teacher}/student_last): AP " in done.out
    step = DetectionTrainer.run_step

    def stops(trainer, batch):
        if trainer.step == 2:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    arguments = [*options_with(teacher, *every_step), "OUTPUT_DIR", tmp_path / "parts"]
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTrainer, "run_step", stops)
        if how == "killed":
            with pytest.raises(Killed):
                train(*arguments, config="KD")
        else:
            assert "--resume continues from" in train(*arguments, config="KD", code=128 + signal.SIGTERM).err
    done = train("--resume", *arguments, config="KD")
    assert "Resuming from" in done.out
    for a, b in zip(*(what_a_run_leaves(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert_equal(a, b)
    again = train(*arguments, config="KD", code=2)
    assert "holds a run already; continue the run by --resume" in again.err and "OUTPUT_DIR" in again.err


def test_more_steps_for_a_finished_run(teacher, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(teacher, folder)
    arguments = [*SHORT, "OUTPUT_DIR", folder, "SOLVER.MAX_ITER"]
    done = train("--resume", *arguments, "8", config="teacher")
    assert "Resuming from" in done.out
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 8
    with (folder / "metrics.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["3", "4", "6", "8"]
    fewer = train("--resume", *arguments, "2", config="teacher", code=2)
    assert "has trained 8 steps, and SOLVER.MAX_ITER is 2" in fewer.err


def test_half_precision_and_workers(teacher, tmp_path):
    more = (
        "SOLVER.AMP.ENABLED",
        "True",
        "DATALOADER.NUM_WORKERS",
        "1",
        "SOLVER.MAX_ITER",
        "2",
        "TEST.EVAL_PERIOD",
        "0",
    )
    done = train(*options_with(teacher, *more), "DISTILLER.TYPE", "VRM", "OUTPUT_DIR", tmp_path / "run", config="KD")
    assert "Step 2/2" in done.out


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    done = train(*SHORT, "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", tmp_path / "run", code=1)
    assert "not finite" in done.err and "a lower SOLVER.BASE_LR than 1e+30" in done.err


BAD = {
    "no-config": (["--config-file", "nowhere.yaml"], "no config file nowhere.yaml"),
    "method": (["DISTILLER.TYPE", "KDD"], "no method for detectors named 'KDD'; closest: KD"),
    "key": (["MODEL.RPN.BOUNDARY_THRESH", "-1"], "MODEL.RPN.BOUNDARY_THRESH: the torchvision engine does not"),
    "value": (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN'"),
    "iterations": (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1"),
    "classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "minicoco_test has 6 classes, and MODEL.ROI_HEADS.NUM_CLASSES"),
    "data": (["DATASETS.TRAIN", "[minicoco]"], "no data set named 'minicoco'; closest: minicoco_t"),
    "no-data": (["DATASETS.TEST", "[coco_2017_val]"], "no annotations "),
    "weights": (["MODEL.WEIGHTS", "nothing.pth"], "no checkpoint nothing.pth"),
    "zoo": (["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"], "is for --engine detectron2"),
    "order": (["MODEL.WEIGHTS", "torchvision://resnet18", "INPUT.FORMAT", "BGR"], "whose first channel is red"),
    "depth": (["MODEL.RESNETS.DEPTH", "50"], "MODEL.RESNETS.RES2_OUT_CHANNELS is 8; with DEPTH 50"),
    "teacher": (["DISTILLER.TYPE", "KD"], "the method KD needs a teacher: TEACHER.CONFIG names its configuration"),
    "untrained": (["DISTILLER.TYPE", "KD", "TEACHER.CONFIG", "configs/minicoco/teacher.yaml"], "train the teacher: "),
    "engine": (["--engine", "detectron2"], "detectron2 is not installed: pip install"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path):
    given, message = BAD[case]
    if given[0].startswith("--"):
        arguments = ["--engine", "torchvision", "--config-file", "configs/minicoco/NONE.yaml", *TINY]
        place = arguments.index(given[0])
        done = run_script(ROOT / "detection" / "train_net.py", arguments[:place] + given + arguments[place + 2 :])
        assert done.code == 2
    else:
        done = train(*SHORT, *given, "OUTPUT_DIR", tmp_path / "run", code=2)
    assert message in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit(teacher, tmp_path):
    wider = [*SHORT, "MODEL.FPN.OUT_CHANNELS", "24", "MODEL.WEIGHTS", teacher / "student_last"]
    assert "does not fit" in train(*wider, "OUTPUT_DIR", tmp_path / "run", code=2).err
    blue = [*SHORT, "INPUT.FORMAT", "BGR", "MODEL.WEIGHTS", teacher / "student_last"]
    done = train(*blue, "OUTPUT_DIR", tmp_path / "run", code=2)
    assert "was trained with INPUT.FORMAT RGB (its config.yaml), and the student's configuration has BGR" in done.err
    broken = tmp_path / "broken"
    broken.write_bytes((teacher / "student_last").read_bytes()[:5000])
    assert "damaged" in train(*SHORT, "MODEL.WEIGHTS", broken, "OUTPUT_DIR", tmp_path / "run", code=2).err


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_classifier_gives_the_backbone(tmp_path, norm):
    """The final student of a classification run, whose layers are torchvision's."""
    torch.manual_seed(1)
    classifier = build_model(imagenet_model_dict, "ResNet18", 10)
    torch.save({"model": classifier.state_dict()}, tmp_path / "student_last")
    options = ["MODEL.WEIGHTS", str(tmp_path / "student_last"), "MODEL.RESNETS.NORM", norm]
    cfg = config.load("configs/VOC/VOC-R18.yaml", options)
    detector = build_detector(cfg)
    load_start(detector, cfg)
    state = detector.backbone.body.state_dict()
    assert all(torch.equal(value, classifier.state_dict()[key]) for key, value in state.items())
    assert len(state) > 60
    with pytest.raises(InputError, match="whose first channel is red"):
        load_start(detector, config.load("configs/VOC/VOC-R18.yaml", [*options, "INPUT.FORMAT", "BGR"]))
    with pytest.raises(InputError, match="does not fit"):
        cfg = config.load("configs/NONE/NONE-R50.yaml", options)
        load_start(build_detector(cfg), cfg)


def test_weights_of_torchvision(tmp_path, monkeypatch):
    cfg = config.load("configs/NONE/NONE-R18.yaml")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_start(build_detector(cfg), cfg)
    classifier = resnet18()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **how: classifier.state_dict())
    detector = build_detector(cfg)
    load_start(detector, cfg)
    assert torch.equal(detector.backbone.body.conv1.weight, classifier.conv1.weight)

    def offline(*args, **how):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(InputError, match=r"cannot be fetched: no network; download https://.*resnet18"):
        load_start(build_detector(cfg), cfg)
    other = config.load("configs/NONE/NONE-R18.yaml", ["MODEL.WEIGHTS", "torchvision://resnet19"])
    with pytest.raises(InputError, match="torchvision has no weights IMAGENET1K_V1 of 'resnet19'"):
        load_start(detector, other)


@pytest.mark.parametrize("step, share", [(0, 0.1), (5, 0.55), (10, 1.0), (19, 1.0), (20, 0.1), (30, 0.01)])
def test_rates_are_detectron2s(step, share):
    cfg = config.load("configs/minicoco/NONE.yaml", [
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(20, 30)", "SOLVER.WARMUP_ITERS", "10"),
        *("SOLVER.BASE_LR", "2.0", "SOLVER.WARMUP_FACTOR", "0.1"),
    ])  # fmt: skip
    assert learning_rate(cfg.SOLVER, step) == pytest.approx(2 * share)


CONFIGS = sorted((ROOT / "detection" / "configs").glob("*/[!_]*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads(path):
    cfg = config.load(path)
    if cfg.DISTILLER.TYPE != "NONE":
        teacher = config.load(cfg.TEACHER.CONFIG)
        assert teacher.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert teacher.OUTPUT_DIR != cfg.OUTPUT_DIR
    if not {"minicoco", "VOC", "_base_"} & set(path.parts):
        solver = cfg.SOLVER
        assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.BASE_LR) == (180000, 8, 0.01)
        assert list(solver.STEPS) == [120000, 160000]


def test_the_pairs_of_the_papers_have_a_configuration_for_each_method():
    names = {path.stem for path in CONFIGS}
    types = {config.load(path).DISTILLER.TYPE for path in CONFIGS}
    assert {"DKD-R18-R101", "ReviewDKD-R50-R101", "ReviewKD-MV2-R50"} <= names
    assert types == set(dense_dict)
    weight = config.load("configs/ReviewKD/ReviewKD-R18-R101.yaml").DISTILLER.REVIEWKD.WEIGHT
    assert weight == 1.2


@pytest.mark.parametrize("student", ["R18", "MV2"])
def test_a_student_of_the_papers_builds_and_steps(student):
    cfg = config.load(f"configs/NONE/NONE-{student}.yaml", ["MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "[64]"])
    losses = build_detector(cfg).train()(*pictures())
    assert all(loss.isfinite() for loss in losses.values())


def test_the_page_names_every_key_and_every_method():
    page = (ROOT / "docs" / "detection.md").read_text()
    assert [key for key in config.OPTIONS if f"| `{key}` |" not in page] == []
    assert [name for name in dense_dict if f"`{name}`" not in page] == []


COMMANDS = re.findall(
    r"^python detection/train_net.py (.*)$", (ROOT / "docs" / "detection.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_are_accepted(line, monkeypatch):
    reached = []
    monkeypatch.setattr("mdistiller.detection.run.run", lambda cfg, **how: reached.append(cfg))
    done = run_script(ROOT / "detection" / "train_net.py", line.split())
    assert done.code == 0 and reached, done.err


@pytest.mark.parametrize("tree, advice", [
    ("KD: {TYPE: DKD}", "KD.TYPE is DISTILLER.TYPE here"),
    ("TEACHER: {MODEL: {RESNETS: {DEPTH: 101}}}", "TEACHER.CONFIG names the teacher's own file"),
    ("MODEL: {ROI_MASK_HEAD: {NUM_CONV: 4}}", "there are no masks"),
    ("MODEL: {META_ARCHITECTURE: RCNNKD}", "must be 'GeneralizedRCNN', the only value"),
    ("MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone_kd}}", "closest: build_resnet_fpn_backbone"),
])  # fmt: skip
def test_mdistillers_files_are_refused_with_advice(tmp_path, tree, advice):
    (tmp_path / "theirs.yaml").write_text(f"{tree}\n")
    with pytest.raises(InputError, match=advice):
        config.load(tmp_path / "theirs.yaml")


def test_a_file_is_found_from_the_root_and_from_inside(monkeypatch):
    monkeypatch.chdir(ROOT)
    first = config.load("detection/configs/minicoco/KD.yaml")
    monkeypatch.chdir(ROOT / "detection")
    assert config.load("configs/minicoco/KD.yaml") == first
    with pytest.raises(InputError, match="no config file"):
        config.load("minicoco/KD.yaml")
