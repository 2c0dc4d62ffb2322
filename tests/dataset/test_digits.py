"""The bundled digits: a fixed split, levels, sizes and constants."""

import sys
from pathlib import Path

import pytest
import torch

from mdistiller.dataset import Digits
from mdistiller.registry import InputError


@pytest.fixture(scope="module")
def splits():
    return Digits(Path("unused"), 16).load()


def test_shapes_and_levels(splits):
    for part in splits:
        assert part.images.pixels().shape == (len(part), 3, 16, 16)
        assert part.images.pixels().dtype == torch.uint8 and part.targets.dtype == torch.int64
        assert part.images.pixels().min() == 0 and part.images.pixels().max() == 255
        assert torch.equal(part.images.pixels()[:, 0], part.images.pixels()[:, 2])


def test_every_class_gives_30_percent_to_the_test(splits):
    train, test = splits
    assert (len(train), len(test)) == (1258, 539)
    counts = train.targets.bincount(), test.targets.bincount()
    assert len(counts[0]) == 10
    assert ((counts[1] / (counts[0] + counts[1])) - 0.3).abs().max() < 0.003


def test_the_split_never_changes(splits):
    """A new split would make results of different versions incomparable."""
    assert splits[1].targets[:20].tolist() == [1, 5, 0, 5, 7, 6, 8, 8, 7, 3, 1, 2, 1, 3, 6, 9, 9, 3, 4, 1]


def test_no_image_is_in_both(splits):
    train, test = ({image.numpy().tobytes() for image in part.images.pixels()} for part in splits)
    assert not train & test


def test_constants_are_those_of_the_training_images(splits):
    level = splits[0].images.pixels().double() / 255
    assert level.mean((0, 2, 3)).tolist() == pytest.approx(Digits.mean, abs=5e-5)
    assert level.std((0, 2, 3)).tolist() == pytest.approx(Digits.std, abs=5e-5)


def test_native_size_is_the_original():
    from sklearn.datasets import load_digits

    train, test = Digits(Path("unused"), 8).load()
    levels = torch.cat([train.images.pixels(), test.images.pixels()])[:, 0].double() / 255 * 16
    assert (levels - levels.round()).abs().max() < 0.04
    assert levels.round().sum() == load_digits().images.sum()


def test_no_view_flips():
    assert not any("Flip" in type(operation).__name__ for view in Digits.views.values() for operation in view)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        Digits(Path("unused"), 16).load()
