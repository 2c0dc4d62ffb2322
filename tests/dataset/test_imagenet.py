"""ImageNet from a folder of small images: found, cropped as torchvision does, loaded by workers, trained on."""

import math
import shlex

import pytest
import torch
from cli_runner import ROOT, run_tool
from image_folders import write_images
from PIL import Image
from torchvision import transforms

from mdistiller.analysis.sheets import class_sheet, view_sheet
from mdistiller.dataset import ImageNet, build_loaders, dataset_dict
from mdistiller.dataset.files import InFiles, RandomResizedCrop, ResizeAndCentreCrop
from mdistiller.dataset.views import Draws, apply_view
from mdistiller.engine.cfg import load_config
from mdistiller.registry import InputError

CLASSES = [f"n{label:04}" for label in range(3)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageNet, "num_classes", len(CLASSES))
    for name in ("train", "val"):
        write_images(tmp_path / "imagenet" / name, CLASSES)
    return tmp_path


def config(root, *options):
    given = ["DATASET.TYPE", "imagenet", "DATASET.ROOT", str(root), "DATASET.IMAGE_SIZE", 32, "SOLVER.BATCH_SIZE", 6,
             "DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", "ResNet18", "DATASET.NUM_WORKERS", 0]  # fmt: skip
    return load_config(options=[*given, *options])


def files(root, size=32):
    return ImageNet(root, size).load()[0].images


def test_every_file_with_its_class(root):
    train, test = ImageNet(root, 32).load()
    assert len(train) == len(test) == 12 == len(train.images)
    assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert all(CLASSES[label] in path for path, label in zip(train.images.paths, train.targets.tolist(), strict=True))
    assert train.take(torch.tensor([5, 2])).images.paths == [train.images.paths[5], train.images.paths[2]]


def test_the_middle_is_torchvisions(root):
    found = apply_view(ImageNet.views["test"], files(root, 28), Draws(torch.arange(12)))
    official = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.PILToTensor()])
    for image, path in zip(found, files(root).paths, strict=True):
        assert (image.int() - official(Image.open(path).convert("RGB")).int()).abs().max() <= 2


def test_a_window_is_cut_and_scaled_as_by_torchvision(root):
    images, crop = files(root), RandomResizedCrop()
    rng = Draws.of_view("weak", 1, 2, torch.arange(12))
    numbers = torch.stack([rng.uniform(slot) for slot in range(crop.slots)], 1).tolist()
    for image, path, drawn in zip(crop(images, rng), images.paths, numbers, strict=True):
        picture = Image.open(path).convert("RGB")
        left, top, width, height = crop.window(*picture.size, drawn)
        expected = transforms.functional.resized_crop(picture, top, left, height, width, [32, 32])
        assert (image.int() - transforms.functional.pil_to_tensor(expected).int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (300, 20)])
def test_windows_are_distributed_as_torchvisions(size):
    crop, picture = RandomResizedCrop(), Image.new("RGB", size)
    rng = Draws.of_view("weak", 0, 1, torch.arange(3000))
    numbers = torch.stack([rng.uniform(slot) for slot in range(crop.slots)], 1).tolist()
    found = torch.tensor([crop.window(*size, drawn) for drawn in numbers]).float()
    torch.manual_seed(0)
    official = [transforms.RandomResizedCrop.get_params(picture, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(3000)]
    official = torch.tensor(official).float()[:, [1, 0, 3, 2]]  # it says top, left, height, width
    assert (found[:, 0] + found[:, 2]).max() <= size[0] and (found[:, 1] + found[:, 3]).max() <= size[1]
    assert found.min() >= 0
    scale = torch.tensor([size[0], size[1], size[0], size[1]])
    assert ((found.mean(0) - official.mean(0)) / scale).abs().max() < 5 * 0.3 * math.sqrt(2 / 3000)
    assert ((found.std(0) - official.std(0)) / scale).abs().max() < 0.02


def test_tensors_are_cropped_as_files_are(root):
    picture = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    rng = Draws.of_view("weak", 0, 1, torch.arange(2))
    whole = RandomResizedCrop(scale=(1, 1), ratio=(1, 1))
    assert torch.equal(whole(picture, rng), picture)
    assert ResizeAndCentreCrop()(picture, rng).shape == picture.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(root, workers):
    loaders = build_loaders(config(root, "DATASET.NUM_WORKERS", workers))
    batches, again = list(loaders.train), list(build_loaders(config(root)).train)
    assert [tuple(batch["image"].shape) for batch in batches] == [(6, 3, 32, 32)] * 2
    for batch, same in zip(batches, again, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert not torch.equal(next(iter(loaders.train))["image"], batches[0]["image"])  # the second epoch
    tested = torch.cat([batch["image"] for batch in loaders.test])
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in (ImageNet.std, ImageNet.mean))
    expected = apply_view(ImageNet.views["test"], ImageNet(root, 32).load()[1].images, Draws(torch.arange(12)))
    torch.testing.assert_close((tested * std + mean) * 255, expected.float(), rtol=0, atol=1e-3)


def test_sheets(root):
    dataset = ImageNet(root, 32)
    split, _ = dataset.load()
    assert view_sheet(dataset, split, count=2, epochs=1).width and class_sheet(dataset, split).width


def test_a_flat_validation_folder_is_named_with_what_sorts_it(root):
    for place in (root / "imagenet" / "val").iterdir():
        for image in place.iterdir():
            image.rename(place.parent / f"{place.name}_{image.name}")
        place.rmdir()
    with pytest.raises(InputError, match=r"the images lie in .*val itself; .*valprep\.sh"):
        ImageNet(root, 32).load()


def test_a_picture_that_would_fill_the_memory_is_refused(root, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    _, split = ImageNet(root, 32).load()
    with pytest.raises(
        InputError, match=r"cannot read the image .*download the image again, or delete it if its class has"
    ):
        split.images.pixels()


def test_by_the_command(root, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = (
        f"DATASET.TYPE imagenet DATASET.ROOT {root} DATASET.IMAGE_SIZE 32 DATASET.NUM_WORKERS 0 SOLVER.EPOCHS 1 "
        f"SOLVER.BATCH_SIZE 6 DISTILLER.TYPE NONE DISTILLER.STUDENT ResNet18 SOLVER.DEVICE cpu "
        f"LOG.PREFIX {tmp_path}/out DATASET.TRAIN_PER_CLASS 2"
    )
    outcome = run_tool("train", shlex.split(command))
    assert outcome.code == 0, outcome
    assert "on 12 test images" in outcome.out


def test_what_is_refused(root, tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere/imagenet/train: ImageNet must be fetched"):
        build_loaders(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="keeps images in memory; imagenet takes workers or auto"):
        build_loaders(config(root, "DATASET.LOADER", "device"))
    dataset_dict["imagenet"].num_classes = 4
    with pytest.raises(InputError, match=r"holds 3 folders: .* of its 4 classes"):
        build_loaders(config(root))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read the image .*damaged\.png"):
        RandomResizedCrop()(InFiles([str(damaged)], 8), Draws(torch.arange(1)))
