"""The drawn data set: the same images everywhere and for ever, balanced, mirrored without harm, neither trivial nor
hopeless."""

import hashlib
import time

import pytest
import torch
import torch.nn.functional as F

from mdistiller.dataset import Shapes, load_splits
from mdistiller.dataset.shapes import OUTLINES, PATTERNS, Placement, draw_images, draw_split, other_color, paint
from mdistiller.dataset.views import Draws
from mdistiller.engine.cfg import load_config
from mdistiller.engine.config.experiment import changed_keys
from mdistiller.registry import InputError


@pytest.fixture(scope="module")
def train():
    return draw_split("train", 2000, 32)


def test_shape_type_and_balance(train):
    assert train.images.pixels().shape == (2000, 3, 32, 32)
    assert (train.images.pixels().dtype, train.targets.dtype) == (torch.uint8, torch.int64)
    assert (train.targets.bincount(minlength=100) == 20).all()
    assert draw_split("train", 250, 32).targets.bincount(minlength=100).tolist() == [3] * 50 + [2] * 50


def test_the_images_never_change(train):
    """Another digest is another data set: results of different versions would be incomparable."""
    digest = hashlib.sha256(train.images.pixels()[:500].numpy().tobytes()).hexdigest()
    assert digest[:16] == "8fde2116c2ee9901"


def test_a_larger_split_begins_with_the_smaller_one(train):
    assert torch.equal(draw_split("train", 313, 32).images.pixels(), train.images.pixels()[:313])


def test_an_image_does_not_depend_on_its_batch():
    labels, index = torch.arange(40) % 100, torch.arange(40)
    whole = draw_images(labels, Draws.of_view("v", 1, 2, index), 32)
    for part in (slice(0, 1), torch.tensor([39, 3, 3])):
        assert torch.equal(draw_images(labels[part], Draws.of_view("v", 1, 2, index[part]), 32), whole[part])


def test_the_splits_share_no_image(train):
    test = draw_split("test", 1000, 32)
    assert len({image.numpy().tobytes() for image in (*train.images.pixels(), *test.images.pixels())}) == 3000


@pytest.mark.parametrize("size", [1, 8, 17, 64])
def test_any_size(size):
    images = draw_split("train", 100, size).images.pixels()
    assert images.shape == (100, 3, size, size)


def test_sizes_are_drawings_of_the_same_scene():
    """Not other images: the large one, shrunk, is close to the small one."""
    small, large = (draw_split("train", 200, size).images.pixels().float() for size in (32, 96))
    shrunk = F.interpolate(large, (32, 32), mode="area")
    difference = (small - shrunk).abs().mean((1, 2, 3))
    others = (small - shrunk.roll(1, 0)).abs().mean((1, 2, 3))
    assert (difference < others).all()
    assert difference.mean() < 12  # noise of both included


def placed(count, x=0.0, sign=1.0):
    def field(value):
        return torch.full((count,), float(value))

    return Placement(
        field(x), field(0.1), field(0.8), field(0.8), field(0.6 * sign), field(1.1),
        field(1.0), field(0.0), field(0.5), field(0.0), field(0.0),
    )  # fmt: skip


@pytest.mark.parametrize("shape", range(len(OUTLINES)), ids=lambda i: OUTLINES[i].__name__)
def test_an_outline_is_its_own_mirror_image(shape):
    """Flipping an image turns an object turned by t into the same object turned by -t: no class changes."""
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 65), torch.linspace(-1, 1, 65), indexing="xy"))
    colors = torch.tensor([[[255, 0, 0], [255, 0, 0]]])
    chosen = torch.tensor([shape]), torch.tensor([0])
    canvas = torch.zeros(1, 3, 65, 65)
    one = paint(canvas, grid, *chosen, placed(1, x=0.2), colors)
    other = paint(canvas, grid, *chosen, placed(1, x=-0.2, sign=-1.0), colors)
    torch.testing.assert_close(one.flip(3), other, atol=0.1, rtol=0)


def test_a_pattern_is_its_own_mirror_image():
    """Up to its phase, its turn and which of the two colours is first, which are all drawn."""
    x, y = torch.rand(2, 1, 40, 40) * 2 - 1
    gauge, rest = x.abs() + y.abs(), [torch.full((1, 1, 1), v) for v in (0.5, 0.3, 0.2, 10.0)]
    turned_back = {"half": True, "gradient": True, "quarters": True}  # the second colour where the first was
    for pattern in PATTERNS:
        share = pattern(x, y, gauge, *rest).clamp(0, 1)
        mirrored_phase = [rest[0], -rest[1], *rest[2:]] if pattern.__name__ in ("stripes", "checks", "dots") else rest
        mirrored = pattern(-x, y, gauge, *mirrored_phase).clamp(0, 1)
        if pattern.__name__ in turned_back:
            mirrored = 1 - mirrored
        torch.testing.assert_close(mirrored, share, atol=1e-4, rtol=0)


def test_colours_are_apart_and_say_nothing(train):
    color = torch.randint(0, 256, (5000, 3))
    far = (other_color(color, Draws.of_view("v", 0, 1, torch.arange(5000))) - color).abs()
    far = torch.minimum(far, 256 - far).amax(1)
    assert far.min() >= 64
    mean = train.images.pixels().float().mean((2, 3))
    between = torch.stack([mean[train.targets == label].mean(0) for label in range(100)]).var(0)
    assert (between < 2.5 * mean.var(0) / 20).all()  # 1 / 20 is what chance gives


def test_constants_are_those_of_the_training_images(train):
    level = train.images.pixels().double() / 255
    assert level.mean((0, 2, 3)).tolist() == pytest.approx(Shapes.mean, abs=0.01)
    assert level.std((0, 2, 3)).tolist() == pytest.approx(Shapes.std, abs=0.01)


def test_nearest_neighbours_and_a_linear_classifier_do_not_get_far(train):
    """Pixels alone say little; above chance (1 %) but far below what the networks of the configs reach."""
    test = draw_split("test", 1000, 32)
    x, z = ((split.images.pixels().float().flatten(1) / 255 - 0.5) * 4 for split in (train, test))
    nearest = train.targets[torch.cdist(z, x).argmin(1)]
    assert (nearest == test.targets).float().mean() < 0.05
    ridge = torch.linalg.solve(x @ x.T + 3000 * torch.eye(len(x)), F.one_hot(train.targets, 100).float() - 0.01)
    linear = (z @ (x.T @ ridge)).argmax(1)
    assert (linear == test.targets).float().mean() < 0.05


def test_drawing_takes_seconds():
    start = time.process_time()
    draw_split("train", 1000, 32)
    assert time.process_time() - start < 5  # 0.25 on one core of a server


def test_sizes_come_from_the_configuration():
    options = ["DATASET.TYPE", "shapes", "DATASET.SHAPES.TRAIN_SIZE", "300", "DATASET.SHAPES.TEST_SIZE", "100"]
    cfg = load_config(options=options)
    splits = load_splits(cfg)
    assert (len(splits.train), len(splits.test)) == (300, 100)
    default = load_config(options=["DATASET.TYPE", "shapes"])
    assert (default.DATASET.SHAPES.TRAIN_SIZE, default.DATASET.SHAPES.TEST_SIZE) == (20_000, 2_000)
    fatal, _ = changed_keys(default, cfg)
    assert len(fatal) == 2  # a run is not resumed with other images


@pytest.mark.parametrize("key", ["TRAIN_SIZE", "TEST_SIZE"])
def test_every_class_needs_an_image(key):
    with pytest.raises(InputError, match=rf"DATASET.SHAPES.{key} must be at least 100 .*, got 99"):
        load_config(options=["DATASET.TYPE", "shapes", f"DATASET.SHAPES.{key}", "99"])


@pytest.mark.gpu
def test_same_on_the_gpu():
    labels, index = torch.arange(500) % 100, torch.arange(500)
    here = draw_images(labels, Draws.of_view("v", 1, 2, index), 32)
    there = draw_images(labels.cuda(), Draws.of_view("v", 1, 2, index.cuda()), 32)
    assert torch.equal(there.cpu(), here)
