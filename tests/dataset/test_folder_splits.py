"""Folders named one by one: training, validation and test images; held-out images; statistics; names of classes."""

import json

import pytest
import torch
import yaml
from cli_runner import ROOT, run_tool
from image_folders import write_images

from mdistiller.dataset import build_loaders, load_splits, open_dataset
from mdistiller.engine.cfg import load_config
from mdistiller.engine.config.experiment import same_result
from mdistiller.registry import InputError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos", CLASSES, count=10)
    return tmp_path / "photos"


def config(photos, *options):
    given = ["DATASET.TYPE", "folder", "DATASET.FOLDER.TRAIN", str(photos), "DATASET.IMAGE_SIZE", 16]
    return load_config(options=[*given, "DATASET.NUM_WORKERS", 0, *map(str, options)])


def names(images, folder):
    return {path.removeprefix(f"{folder}/") for path in images.names}


def test_a_fifth_of_each_class_is_held_out_by_name(photos, capsys):
    splits = load_splits(config(photos))
    assert splits.val is None
    assert (splits.train.targets.bincount().tolist(), splits.test.targets.bincount().tolist()) == ([8] * 3, [2] * 3)
    assert not names(splits.train.images, photos) & names(splits.test.images, photos)
    assert "6 of 30 images, a fifth of each class, are held out as test images" in capsys.readouterr().out
    held_out = names(splits.test.images, photos)
    assert names(load_splits(config(photos, "EXPERIMENT.SEED", 3)).test.images, photos) == held_out
    (photos / "bee" / "0.png").rename(photos / "bee" / "other.png")
    later = names(load_splits(config(photos)).test.images, photos)
    assert len(later ^ held_out) <= 2 and {n for n in later if "bee" not in n} == {
        n for n in held_out if "bee" not in n
    }
    elsewhere = photos.rename(photos.parent / "elsewhere")
    assert names(load_splits(config(elsewhere)).test.images, elsewhere) == later


def test_a_class_of_one_image_is_trained_on(photos):
    write_images(photos, ["dog"], count=1)
    splits = load_splits(config(photos))
    assert splits.train.targets.bincount().tolist() == [8, 8, 8, 1]


def test_test_and_validation_images_by_name(photos, tmp_path):
    write_images(tmp_path / "b", CLASSES[:2], count=3)
    write_images(tmp_path / "c", CLASSES[1:], count=2)
    both = config(photos, "DATASET.FOLDER.TEST", tmp_path / "b", "DATASET.FOLDER.VAL", tmp_path / "c")
    splits = load_splits(both)
    assert [len(split) for split in (splits.train, splits.test, splits.val)] == [30, 6, 4]
    assert splits.val.targets.tolist() == [1, 1, 2, 2]
    assert len(build_loaders(both).val.dataset) == 4
    splits = load_splits(config(photos, "DATASET.FOLDER.VAL", tmp_path / "c"))
    assert splits.val is None and len(splits.test) == 4
    with pytest.raises(InputError, match=r"VAL_FRACTION is 0\.1, and the data set has validation images of its own"):
        load_splits(config(photos, "DATASET.FOLDER.TEST", tmp_path / "b", "DATASET.FOLDER.VAL", tmp_path / "c",
                           "DATASET.VAL_FRACTION", 0.1))  # fmt: skip
    with pytest.raises(InputError, match=r"DATASET.FOLDER.TEST is given and TRAIN is not"):
        load_splits(load_config(options=["DATASET.TYPE", "folder", "DATASET.FOLDER.TEST", str(tmp_path / "b")]))


def test_without_test_images_below_the_root_a_fifth_is_held_out(photos, tmp_path):
    photos.rename(tmp_path / "train")
    cfg = load_config(options=["DATASET.TYPE", "folder", "DATASET.ROOT", str(tmp_path)])
    assert len(load_splits(cfg).test) == 6


def test_statistics(photos):
    given = config(photos, "DATASET.MEAN", "(0.1, 0.2, 0.3)", "DATASET.STD", "imagenet")
    assert open_dataset(given).normalisation == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    assert open_dataset(config(photos)).normalisation == (open_dataset(given).mean, open_dataset(given).std)
    measured = config(photos, "DATASET.MEAN", "auto", "DATASET.STD", "auto", "DATASET.VIEW_WEAK", "plain")
    batch = torch.cat([batch["image"] for batch in build_loaders(measured).train]).transpose(0, 1).flatten(1)
    assert batch.mean(1).abs().max() < 1e-3 and (batch.std(1) - 1).abs().max() < 1e-3
    digits = load_config(options=["DATASET.TYPE", "digits", "DATASET.MEAN", "auto", "DATASET.STD", "auto"])
    for found, known in zip(open_dataset(digits).normalisation, (0.3059, 0.3187), strict=True):
        assert max(abs(value - known) for value in found) < 2e-3
    twice = config(photos, "DATASET.MEAN", "auto", "DATASET.MEAN", "(0, 0, 0)")
    assert twice.DATASET.MEAN == [0, 0, 0]
    for value in ("median", "[1, 2]", "[auto, 1, 2]"):
        with pytest.raises(InputError, match=r"DATASET.MEAN must be empty, auto, imagenet or three numbers"):
            config(photos, "DATASET.MEAN", value)
    with pytest.raises(InputError, match=r"DATASET.STD must be .* above 0"):
        config(photos, "DATASET.STD", "[1, 0, 1]")


def test_measured_statistics_and_classes_are_kept_beside_the_run(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--cfg", "configs/folder/vanilla.yaml", "DATASET.FOLDER.TRAIN", photos, "DATASET.IMAGE_SIZE", 32]
    words += ["DATASET.NUM_WORKERS", 0, "DISTILLER.STUDENT", "cifar:resnet8", "SOLVER.BATCH_SIZE", 8]
    words += ["DATASET.MEAN", "auto", "DATASET.STD", "auto", "SOLVER.DEVICE", "cpu", "LOG.PREFIX", tmp_path / "out"]
    words += ["EXPERIMENT.NAME", "a"]
    outcome = run_tool("train", [*words, "SOLVER.EPOCHS", 2])
    assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / "out" / "folder" / "a"
    assert json.loads((folder / "classes.json").read_text()) == CLASSES
    before = yaml.safe_load((folder / "config.yaml").read_text())
    assert all(0 < value < 1 for value in before["DATASET"]["MEAN"])
    asked = load_config(words[1], [*map(str, words[2:]), "SOLVER.EPOCHS", 2])
    assert asked.DATASET.MEAN == ["auto"] and same_result(before, asked)

    for image in (photos / "ant").iterdir():
        image.write_bytes((photos / "bee" / image.name).read_bytes())  # other statistics, the same names
    assert run_tool("train", [*words, "SOLVER.EPOCHS", 3, "--resume"]).code == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["DATASET"]["MEAN"] == before["DATASET"]["MEAN"]
    (photos / "ant").rename(photos / "aphid")
    outcome = run_tool("train", [*words, "SOLVER.EPOCHS", 4, "--resume"])
    assert outcome.code == 2
    assert "was run with other classes: it has ant, and the data set now has aphid" in outcome.err


def test_networks_of_all_tables_train_on_a_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("cifar:resnet8", "timm:test_resnet", "torchvision:squeezenet1_1", "ResNet18"):
        words = ["--cfg", "configs/folder/vanilla.yaml", "DATASET.FOLDER.TRAIN", photos, "DATASET.IMAGE_SIZE", 32]
        words += ["DATASET.NUM_WORKERS", 0, "DISTILLER.STUDENT", name, "SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 0]
        words += ["SOLVER.BATCH_SIZE", 12, "SOLVER.LR", 0.001, "SOLVER.DEVICE", "cpu"]
        words += ["LOG.PREFIX", tmp_path / "out", "EXPERIMENT.NAME", name.replace(":", "_")]
        outcome = run_tool("train", words)
        assert outcome.code == 0, outcome
