"""CIFAR-10, STL-10 and Tiny-ImageNet from small files in the formats of their authors."""

import pickle

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image

from mdistiller.dataset import build_loaders, load_splits, open_dataset
from mdistiller.dataset.tiny_imagenet import TinyImageNet
from mdistiller.engine.cfg import load_config
from mdistiller.registry import InputError


def config(kind, root, *options):
    given = ["DATASET.TYPE", kind, "DATASET.ROOT", str(root), "DATASET.NUM_WORKERS", 0, "SOLVER.BATCH_SIZE", 5]
    return load_config(options=[*given, "DISTILLER.TYPE", "VRM", *options])


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        data[0] = np.repeat([number, 50, 100], 1024)  # red, green and blue planes
        with (folder / name).open("wb") as file:
            pickle.dump({"data": data, "labels": [number, 9, 8, 7], "batch_label": name}, file, protocol=2)
    splits = load_splits(config("cifar10", tmp_path))
    assert (len(splits.train), len(splits.test)) == (20, 4)
    assert splits.train.targets[::4].tolist() == [0, 1, 2, 3, 4] and splits.test.targets.tolist() == [5, 9, 8, 7]
    assert splits.test.images.pixels()[0].flatten(1).float().mean(1).tolist() == [5, 50, 100]
    assert open_dataset(config("cifar10", tmp_path)).classes[3] == "cat"
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"CIFAR-10: cannot read .*data_batch_3: .*; download the python version"):
        load_splits(config("cifar10", tmp_path))


def test_stl10(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    picture = np.zeros((3, 96, 96), dtype=np.uint8)
    picture[0, :48], picture[1, :, 48:] = 200, 100  # red above, green at the right
    for name, labels in (("train", [1, 10, 3]), ("test", [2])):
        stored = np.stack([picture.transpose(0, 2, 1)] * len(labels))  # column by column
        stored.tofile(folder / f"{name}_X.bin")
        np.array(labels, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    splits = load_splits(config("stl10", tmp_path, "DATASET.IMAGE_SIZE", 96))
    assert splits.train.targets.tolist() == [0, 9, 2] and splits.test.targets.tolist() == [1]
    assert torch.equal(splits.train.images.pixels()[1], torch.from_numpy(picture))
    assert load_splits(config("stl10", tmp_path)).test.images.size == (32, 32)
    np.array([0, 1, 2], dtype=np.uint8).tofile(folder / "train_y.bin")
    with pytest.raises(InputError, match=r"STL-10: cannot read .*train_X.bin .*: 3 images and 3 labels from 1 to 10"):
        load_splits(config("stl10", tmp_path))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyImageNet, "num_classes", 2)
    folder, names = tmp_path / "tiny-imagenet-200", ["n02", "n01"]
    write_images(folder / "train", [f"{name}/images" for name in names], count=3, suffix=".JPEG")
    for name in names:
        (folder / "train" / name / f"{name}_boxes.txt").touch()
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "val" / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (100 * number, 0, 0)).save(folder / "val" / "images" / f"val_{number}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{number}.JPEG\t{name}\t0\t0\t1\t1\n" for number, name in ((2, "n01"), (0, "n02"), (1, "n01")))
    )
    return tmp_path


def test_tiny_imagenet(tiny):
    cfg = config("tiny_imagenet", tiny)
    splits = load_splits(cfg)
    assert open_dataset(cfg).classes == ("n01", "n02")
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1, 1] and splits.test.targets.tolist() == [0, 1, 0]
    assert splits.test.images.pixels()[:, 0].float().mean((1, 2)).round().tolist() == [200, 0, 100]
    (batch, _) = build_loaders(cfg).train
    assert batch["image_weak"].shape == batch["image_strong"].shape == (5, 3, 64, 64)
    (tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\n")
    with pytest.raises(InputError, match=r"names no known class for \['val_0.JPEG'\]; unpack http"):
        load_splits(config("tiny_imagenet", tiny))


@pytest.mark.parametrize("kind", ["cifar10", "stl10", "tiny_imagenet"])
def test_missing_files_are_named_with_their_source(kind, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*; (download|unpack) .*DATASET.ROOT names the folder"):
        load_splits(config(kind, tmp_path))
