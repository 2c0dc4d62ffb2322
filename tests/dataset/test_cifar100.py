"""CIFAR-100 from a miniature in the true on-disk format; damaged, missing and hostile files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_cifar import dumps_like_the_original, write_mini_cifar100
from torchvision import datasets
from torchvision.datasets import CIFAR10

from mdistiller.dataset import CIFAR100
from mdistiller.registry import InputError


def entry_of(path: Path) -> dict:
    return pickle.loads(path.read_bytes(), encoding="latin1")


@pytest.fixture
def root(tmp_path):
    write_mini_cifar100(tmp_path, train_per_class=3, test_per_class=1)
    return tmp_path


@pytest.fixture
def train_file(root):
    return root / "cifar-100-python" / "train"


def test_images_and_labels(root, train_file, capsys):
    train, test = CIFAR100(root, 32, download=True).load()
    entry = entry_of(train_file)
    assert train.images.pixels().shape == (300, 3, 32, 32) and test.images.pixels().shape == (100, 3, 32, 32)
    assert train.images.pixels().dtype == torch.uint8 and train.targets.dtype == torch.int64
    assert train.targets.tolist() == entry["fine_labels"]
    assert np.array_equal(train.images.pixels().numpy(), entry["data"].reshape(-1, 3, 32, 32))
    said = capsys.readouterr().out
    assert "not hold the official CIFAR-100 files" in said
    assert "300 training and 100 test images" in said


def test_same_images_as_torchvision_reads(root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    theirs = datasets.CIFAR100(root, train=True)
    ours, _ = CIFAR100(root, 32, download=False).load()
    assert np.array_equal(ours.images.pixels().permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.targets.tolist() == theirs.targets


def test_official_files_are_not_warned_about(root, monkeypatch, capsys):
    monkeypatch.setattr("mdistiller.dataset.cifar100.check_integrity", lambda path, md5: True)
    CIFAR100(root, 32, download=True).load()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_pickle_protocol(root, train_file, protocol):
    before, _ = CIFAR100(root, 32, download=False).load()
    train_file.write_bytes(pickle.dumps(entry_of(train_file), protocol=protocol))
    after, _ = CIFAR100(root, 32, download=False).load()
    assert torch.equal(before.images.pixels(), after.images.pixels())


def test_resized(root):
    full, _ = CIFAR100(root, 32, download=False).load()
    train, test = CIFAR100(root, 16, download=False).load()
    assert train.images.pixels().shape == (300, 3, 16, 16) and test.images.pixels().shape == (100, 3, 16, 16)
    assert abs(train.images.pixels().float().mean() - full.images.pixels().float().mean()) < 0.5


def test_missing_and_not_to_be_downloaded(tmp_path):
    with pytest.raises(InputError, match=r"/train is missing .*~kriz/cifar.html .* DATASET.ROOT"):
        CIFAR100(tmp_path, 32, download=False).load()


def test_one_file_missing(root, train_file):
    (train_file.parent / "test").unlink()
    with pytest.raises(InputError, match="cifar-100-python/test is missing"):
        CIFAR100(root, 32, download=False).load()


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_no_network(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(InputError, match=rf"could not be downloaded \({error}\); .*~kriz/cifar.html"):
        CIFAR100(tmp_path, 32, download=True).load()


def test_files_that_are_there_are_not_downloaded_over(root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloaded"))
    CIFAR100(root, 32, download=True).load()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", b"\x80\x02}q", pickle.dumps([1, 2]), pickle.dumps({"data": 1})],
    ids=["empty", "text", "cut", "list", "no labels"],
)
def test_damaged(root, train_file, content):
    train_file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*/train: .*; delete .*~kriz/cifar.html"):
        CIFAR100(root, 32, download=True).load()


def test_cut_off_in_the_middle(root, train_file):
    train_file.write_bytes(train_file.read_bytes()[:-5000])
    with pytest.raises(InputError, match="cannot read"):
        CIFAR100(root, 32, download=True).load()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": np.zeros((300, 3072))}, "not a filled table of bytes"),
        ({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, "cannot read"),
        ({"data": np.zeros((300, 784), np.uint8)}, "expected"),
        ({"fine_labels": [0] * 299}, "299 labels"),
        ({"fine_labels": [100] * 300}, "from 0 to 99"),
        ({"fine_labels": [-1] * 300}, "from 0 to 99"),
        ({"fine_labels": [0.5] * 300}, "from 0 to 99"),
    ],
)
def test_wrong_contents(root, train_file, change, says):
    train_file.write_bytes(dumps_like_the_original(entry_of(train_file) | change))
    with pytest.raises(InputError, match=says):
        CIFAR100(root, 32, download=True).load()


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_hostile_file_is_executed(root, train_file, tmp_path, protocol):
    trace = tmp_path / "executed"
    content = pickle.dumps(entry_of(train_file) | {"filenames": Touch(trace)}, protocol=protocol)
    pickle.loads(content)
    assert trace.exists()  # the attack works on an unguarded reader
    trace.unlink()
    train_file.write_bytes(content)
    with pytest.raises(InputError, match=r"UnpicklingError: it asks for .*, which image data does not need"):
        CIFAR100(root, 32, download=True).load()
    assert not trace.exists()
