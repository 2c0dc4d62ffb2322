"""Crop, flip, cutout and normalisation against loops; draws that depend on nothing but their keys."""

import numpy as np
import pytest
import torch
from fake_gpu import FakeGPU
from PIL import Image, ImageDraw
from torchvision import transforms
from torchvision.transforms import functional as reference

from mdistiller.dataset import dataset_dict
from mdistiller.dataset.views import (
    Cutout,
    Draws,
    HorizontalFlip,
    RandomCrop,
    Rotate90,
    apply_view,
    is_random,
    normalize,
    rotations,
)

INDEX = torch.arange(100, 140)
IMAGES = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rng():
    return Draws.of_view("weak", seed=1, epoch=2, index=INDEX)


@pytest.mark.parametrize(("padding", "border"), [(None, 3), (4, 4), (0, 0)])
def test_crop(rng, padding, border):
    top, left = (rng.integers(slot, 0, 2 * border + 1).tolist() for slot in (0, 1))
    assert len(set(top)) == len(set(left)) == 2 * border + 1  # every offset occurs
    found = RandomCrop(padding)(IMAGES, rng)
    for image, cropped, y, x in zip(IMAGES, found, top, left, strict=True):
        padded = reference.pad(image, [border] * 4)
        assert torch.equal(cropped, padded[:, y : y + 24, x : x + 24])


@pytest.mark.parametrize(("p", "flipped"), [(0.0, (0, 0)), (0.5, (8, 32)), (1.0, (40, 40))])
def test_flip(rng, p, flipped):
    flip = [u < p for u in rng.uniform(0).tolist()]
    assert flipped[0] <= sum(flip) <= flipped[1]
    found = HorizontalFlip(p)(IMAGES, rng)
    for image, after, is_flipped in zip(IMAGES, found, flip, strict=True):
        assert torch.equal(after, reference.hflip(image) if is_flipped else image)


@pytest.mark.parametrize("size", [(24, 24), (10, 17)])
@pytest.mark.parametrize("max_ratio", [0.5, 0.9])
def test_cutout_is_drawn_as_in_torchssl(size, max_ratio):
    index = torch.arange(300)
    images = torch.randint(0, 256, (300, 3, *size), dtype=torch.uint8)
    rng = Draws.of_view("strong", 0, 1, index)
    found = Cutout(max_ratio)(images, rng)
    height, width = size
    for i in range(300):
        u_side, u_x, u_y = (float(rng.uniform(slot)[i]) for slot in range(3))
        side = u_side * max_ratio * width
        x0 = int(max(0, u_x * width - side / 2))
        y0 = int(max(0, u_y * height - side / 2))
        picture = Image.fromarray(np.ascontiguousarray(images[i].permute(1, 2, 0).numpy()))
        corners = (x0, y0, min(width, x0 + side), min(height, y0 + side))
        ImageDraw.Draw(picture).rectangle(corners, (125, 123, 114))
        assert np.array_equal(np.array(picture), found[i].permute(1, 2, 0).numpy())


def test_cutout_of_side_zero_paints_nothing(rng):
    assert torch.equal(Cutout(max_ratio=0.0)(IMAGES, rng), IMAGES)


def test_normalize_is_bitwise_what_mdistillers_transforms_give():
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([transform(image.permute(1, 2, 0).numpy()) for image in IMAGES])
    found = normalize(IMAGES, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_quarter_turns(rng, k):
    found = Rotate90(k)(IMAGES, rng)
    for image, turned in zip(IMAGES, found, strict=True):
        assert torch.equal(turned, reference.rotate(image, 90 * k))
    assert Rotate90.slots == 0


def test_rotated_views_are_the_view_turned():
    for k, (name, view) in enumerate(rotations((RandomCrop(),)).items(), start=1):
        drawn = Draws.of_view(name, 1, 2, INDEX)
        assert name == f"rot{90 * k}"
        assert torch.equal(apply_view(view, IMAGES, drawn), RandomCrop()(IMAGES, drawn).rot90(k, (2, 3)))


def test_normalize_in_channels_last_changes_the_layout_only():
    mean, std = torch.full((3, 1, 1), 0.47), torch.full((3, 1, 1), 0.26)
    plain, last = (normalize(IMAGES, mean, std, f) for f in (torch.contiguous_format, torch.channels_last))
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()


def recipes():
    every = {f"{name}-{view}": recipe for name, cls in dataset_dict.items() for view, recipe in cls.views.items()}
    return {name: recipe for name, recipe in every.items() if is_random(recipe)}


IN_FILES = [recipe for cls in dataset_dict.values() if cls.in_files for recipe in cls.views.values()]


@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes().keys())
class TestEveryRecipe:
    def test_an_image_does_not_depend_on_its_batch(self, recipe):
        whole = apply_view(recipe, IMAGES, Draws.of_view("v", 1, 2, INDEX))
        for part in (slice(0, 1), slice(3, 20), torch.tensor([7, 3, 3, 39])):
            alone = apply_view(recipe, IMAGES[part], Draws.of_view("v", 1, 2, INDEX[part]))
            assert torch.equal(alone, whole[part])

    def test_the_input_stays_as_it_is(self, recipe):
        before = IMAGES.clone()
        apply_view(recipe, IMAGES, Draws.of_view("v", 1, 2, INDEX))
        assert torch.equal(IMAGES, before)

    def test_other_keys_give_other_images(self, recipe):
        keys = [("v", 1, 2), ("w", 1, 2), ("v", 3, 2), ("v", 1, 4)]
        results = [apply_view(recipe, IMAGES, Draws.of_view(*key, INDEX)) for key in keys]
        assert all(not torch.equal(results[0], other) for other in results[1:])

    def test_mixes_no_devices_and_asks_for_no_value(self, recipe):
        if recipe in IN_FILES:
            pytest.skip("decodes files, on the CPU")
        gpu = FakeGPU()
        images, index = gpu.tensor(IMAGES), gpu.tensor(INDEX)
        with gpu:
            view = apply_view(recipe, images, Draws.of_view("v", 1, 2, index))
        assert (view.shape, view.dtype, view.device.type) == (IMAGES.shape, IMAGES.dtype, "cuda")

    @pytest.mark.gpu
    def test_same_on_the_gpu(self, recipe):
        images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8)
        index = torch.arange(2000)
        mean, std = torch.full((3, 1, 1), 0.47), torch.full((3, 1, 1), 0.26)
        here = normalize(apply_view(recipe, images, Draws.of_view("v", 1, 2, index)), mean, std)
        rng = Draws.of_view("v", 1, 2, index.cuda())
        there = normalize(apply_view(recipe, images.cuda(), rng), mean.cuda(), std.cuda())
        assert torch.equal(there.cpu(), here)


def test_each_operation_has_slots_of_its_own():
    seen = []

    class Probe:
        def __init__(self, slots):
            self.slots = slots

        def __call__(self, images, rng):
            seen.extend(rng.uniform(slot) for slot in range(self.slots))
            return images

    apply_view((Probe(2), Probe(3), Probe(1)), IMAGES, Draws.of_view("v", 1, 2, INDEX))
    assert torch.stack(seen).unique(dim=0).shape[0] == 6
