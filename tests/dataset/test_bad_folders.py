"""Folders and files as users have them: what is refused, what is left out, and what is said about it."""

import os
import sys

import pytest
import torch
from image_folders import write_images
from PIL import Image

from mdistiller.dataset import build_loaders, load_splits, open_dataset
from mdistiller.engine.cfg import load_config
from mdistiller.registry import InputError

CLASSES = ["ant", "bee"]


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos", CLASSES, count=5, suffix=".jpg")
    return tmp_path / "photos"


def config(photos, *options):
    given = ["DATASET.TYPE", "folder", "DATASET.FOLDER.TRAIN", str(photos), "DATASET.IMAGE_SIZE", 16]
    given += ["DATASET.NUM_WORKERS", 0, "SOLVER.BATCH_SIZE", 4]
    return load_config(options=[*given, *map(str, options)])


def used(photos, *options):
    """Names of the images of both splits."""
    splits = load_splits(config(photos, *options))
    return sorted(
        name.removeprefix(f"{photos}/") for split in (splits.train, splits.test) for name in split.images.names
    )


def break_image(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_one_unreadable_image_stops_the_run_and_is_named(photos, workers):
    for name in CLASSES:
        for number in range(5):
            broken = break_image(photos / name / f"{number}.jpg")
    loaders = build_loaders(config(photos, "DATASET.NUM_WORKERS", workers))
    with pytest.raises(InputError) as error:
        list(loaders.train)
    message = str(error.value)
    assert message.startswith(f"cannot read the image {broken.parent.parent}") and "Traceback" not in message
    assert message.endswith("replace or delete the file, or set DATASET.FOLDER.BAD_IMAGE skip")


def test_unreadable_images_are_listed_and_left_out_on_request(photos, capsys):
    broken = [break_image(photos / "bee" / "3.jpg"), photos / "ant" / "note.png"]
    broken[1].write_text("no image at all")
    (photos / "ant" / "empty.jpg").touch()
    assert len(used(photos)) == 12
    capsys.readouterr()
    found = used(photos, "DATASET.FOLDER.BAD_IMAGE", "skip")
    assert len(found) == 9 and not {"bee/3.jpg", "ant/note.png", "ant/empty.jpg"} & set(found)
    said = capsys.readouterr().out
    assert said.count("3 of 12 images in") == 1 and all(str(path) in said for path in broken)
    for path in (photos / "bee").iterdir():
        break_image(path)
    with pytest.raises(InputError, match=r"no image of the class 'bee' in .*photos can be read"):
        used(photos, "DATASET.FOLDER.BAD_IMAGE", "skip")


def test_files_that_are_no_images_of_a_class(photos, capsys):
    before = used(photos)
    (photos / "ant" / "notes.txt").write_text("ants")
    (photos / "ant" / "7.HEIC").touch()
    (photos / "ant" / "._0.jpg").write_bytes(b"a file of a Mac")
    (photos / "bee" / ".thumbnails").mkdir()
    (photos / "bee" / ".thumbnails" / "0.jpg").touch()
    (photos / ".git").mkdir()
    (photos / "readme.md").touch()
    Image.new("RGB", (8, 8)).save(photos / "beside.png")
    capsys.readouterr()
    assert used(photos) == before
    said = capsys.readouterr().out
    assert "1 images lie in" in said and "files that are no images by their names are not used" in said
    assert "1 '.txt'" in said and "1 '.HEIC'" in said


def test_images_in_folders_below_a_class(photos):
    write_images(photos / "ant", ["more"], count=1)
    assert "ant/more/0.png" in used(photos)


def test_odd_names(photos, capsys):
    odd = ["a b", "ö", "x'\"$;", "line\nbreak", "[1]", "-v"]
    if sys.platform == "linux":
        odd.append(os.fsdecode(b"latin \xe9"))
    write_images(photos, odd, count=3, suffix=".JPG")
    for name in odd:
        (photos / name / "0.JPG").rename(photos / name / f"{name}.JPG")
    cfg = config(photos, "DATASET.FOLDER.BAD_IMAGE", "skip")
    break_image(photos / odd[-1] / f"{odd[-1]}.JPG")
    splits = load_splits(cfg)
    assert set(open_dataset(cfg).classes) == {*CLASSES, *odd}
    assert len(splits.train) + len(splits.test) == 10 + 3 * len(odd) - 1
    assert splits.train.images.fingerprint() != splits.test.images.fingerprint()
    assert capsys.readouterr().out.encode()


def test_layouts_that_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere: .* DATASET.FOLDER.TRAIN and TEST name such"):
        load_splits(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"the images lie in .*ant itself; move those of each class into a folder"):
        load_splits(config(photos / "ant"))
    with pytest.raises(InputError, match=r"holds the folder of one class only, 'photos'"):
        load_splits(config(tmp_path))
    write_images(tmp_path / "test", [*CLASSES, "cow"])
    with pytest.raises(InputError, match=r"test holds the class 'cow', which .*photos lacks"):
        load_splits(config(photos, "DATASET.FOLDER.TEST", tmp_path / "test"))
    (photos / "dog").mkdir()
    with pytest.raises(InputError, match=r"the class 'dog' has no image in .*dog; add images .* or delete the folder"):
        load_splits(config(photos))
    photos.rename(tmp_path / "train")
    with pytest.raises(InputError, match=r"holds test, train, which are no classes: DATASET.ROOT .* reads train and"):
        load_splits(config(tmp_path))


def test_a_batch_holds_what_the_files_show(photos):
    """Each class has a tint of its own."""
    loader = build_loaders(config(photos, "DATASET.VIEW_WEAK", "plain")).train
    batches = list(loader)
    image, target = (torch.cat([batch[key] for batch in batches]) for key in ("image", "target"))
    difference = image.mean((2, 3))[:, :2].diff()[:, 0]
    coloured = difference.abs() > 1  # some are grey
    assert coloured.sum() >= 6 and torch.equal(difference[coloured] < 0, target[coloured] == 0)
