"""Images of one's own in folders: their facts come from the disk, and a student is trained on them."""

import csv
import json
import shlex

import pytest
import torch
from cli_runner import ROOT, run_tool
from image_folders import write_images

from mdistiller.dataset import build_loaders, load_splits, open_dataset
from mdistiller.engine.build import build_teacher
from mdistiller.engine.cfg import load_config
from mdistiller.registry import InputError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "train", CLASSES, suffix=".jpg")
    write_images(tmp_path / "val", CLASSES[::2], suffix=".jpg")
    (tmp_path / "train" / ".thumbnails").mkdir()
    return tmp_path


def config(root, *options):
    given = ["DATASET.TYPE", "folder", "DATASET.ROOT", str(root), "DATASET.IMAGE_SIZE", 32, "DATASET.NUM_WORKERS", 0]
    return load_config(options=[*given, *options])


def test_classes_are_the_folders(root):
    dataset = open_dataset(config(root))
    assert (dataset.classes, dataset.num_classes, dataset.image_size) == (tuple(CLASSES), 3, 32)
    splits = load_splits(config(root))
    assert splits.train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert splits.test.targets.tolist() == [0] * 4 + [2] * 4  # the numbers are those of the training images' classes
    assert [path.split("/")[-2] for path in splits.test.images.paths] == ["ant"] * 4 + ["cat"] * 4


def test_another_folder_has_other_classes(root, tmp_path):
    write_images(tmp_path / "other" / "train", ["dog", "elk"])
    loaded = config(root), config(tmp_path / "other")
    assert [open_dataset(cfg).num_classes for cfg in (*loaded, *loaded)] == [3, 2, 3, 2]


def test_a_folder_that_grows_is_seen_by_the_next_configuration(root):
    before = config(root)
    assert open_dataset(before).num_classes == 3
    write_images(root / "train", ["dog"])
    assert open_dataset(before).num_classes == 3  # within a run, all see the same
    assert open_dataset(config(root)).num_classes == 4


def test_test_is_taken_before_val(root, capsys):
    write_images(root / "test", CLASSES, count=1)
    assert len(load_splits(config(root)).test) == 3
    assert "test images are read from" in capsys.readouterr().out


def test_a_teacher_and_its_student_by_the_command(root, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    options = (
        f"DATASET.TYPE folder DATASET.ROOT {root} DATASET.IMAGE_SIZE 32 DATASET.NUM_WORKERS 0 DATASET.VIEW_WEAK plain "
        "SOLVER.BATCH_SIZE 6 SOLVER.EPOCHS 8 SOLVER.LR 0.02 SOLVER.DEVICE cpu DISTILLER.STUDENT cifar:resnet8 "
        f"LOG.PREFIX {tmp_path}/out EXPERIMENT.NAME"
    )

    def trained(name, more=""):
        outcome = run_tool("train", shlex.split(f"{options} {name} {more}"))
        assert (outcome.code, outcome.err) == (0, "")
        folder = tmp_path / "out" / "distill" / name
        losses = [float(row["train_loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]
        assert min(losses) < 0.6 * losses[0]
        return folder / "student_last", json.loads((folder / "results.json").read_text())

    teacher, before = trained("teacher")
    student, results = trained(
        "student", f"DISTILLER.TYPE KD DISTILLER.TEACHER cifar:resnet8 DISTILLER.TEACHER_CKPT {teacher}"
    )
    assert results["teacher"]["top1"] == before["last"]["top1"]
    assert (results["dataset"], results["training_images"]) == ("folder", 12)
    assert torch.load(student)["model"]["fc.weight"].shape == (3, 64)


def test_what_is_refused(root, tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere/train: .* DATASET.ROOT names the folder"):
        build_loaders(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"public weights .* are for 1000 classes, not 3; name your own weights"):
        build_teacher(config(root, "DISTILLER.TEACHER", "ResNet18"), 3)
    write_images(root / "val", ["dog"])
    with pytest.raises(InputError, match=r"val holds the class 'dog', which .*train lacks"):
        build_loaders(config(root))
    (root / "train" / "dog").mkdir()
    with pytest.raises(InputError, match=r"the class 'dog' has no image in .*dog; add images"):
        build_loaders(config(root))
    (tmp_path / "no_folders" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="no_folders/train holds no folder"):
        open_dataset(config(tmp_path / "no_folders")).num_classes  # noqa: B018


def test_asking_for_constants_reads_nothing(tmp_path):
    dataset = open_dataset(config(tmp_path / "nowhere"))
    assert (dataset.image_size, dataset.model_family, dataset.in_files) == (32, "imagenet", True)
