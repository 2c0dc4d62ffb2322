"""Colour jitter against torchvision's, random erasing against what it promises."""

import pytest
import torch
from torchvision.transforms import functional as reference

from mdistiller.dataset.augment import ColorJitter, RandomErasing
from mdistiller.dataset.views import Draws, apply_view

INDEX = torch.arange(300, 700)
IMAGES = torch.randint(0, 256, (400, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rng_of(index=INDEX):
    return Draws.of_view("weak", seed=1, epoch=2, index=index)


@pytest.mark.parametrize("strength", [0.2, 0.4, 1.0])
def test_color_jitter_is_torchvisions_in_a_fixed_order(strength):
    found, rng = ColorJitter(strength)(IMAGES, rng_of()), rng_of()
    factors = torch.stack([1 + strength * (2 * rng.uniform(slot) - 1) for slot in range(3)], 1)
    assert factors.min() < 1 - 0.9 * strength and factors.max() > 1 + 0.9 * strength
    for image, jittered, (brightness, contrast, saturation) in zip(IMAGES, found, factors.tolist(), strict=True):
        expected = reference.adjust_brightness(image.float() / 255, brightness)
        expected = reference.adjust_contrast(expected, contrast)
        expected = 255 * reference.adjust_saturation(expected, saturation)
        assert (jittered - expected).abs().max() <= 0.6  # it is rounded once, at the end; torchvision's weights differ


def test_random_erasing_paints_one_rectangle():
    found = RandomErasing(1.0)(IMAGES, rng_of())
    areas = []
    for image, erased in zip(IMAGES, found, strict=True):
        painted = (erased != image).any(0)  # noise hits a pixel's own colour once in 2^24
        rows, columns = painted.any(1), painted.any(0)
        assert torch.equal(painted, rows[:, None] & columns)
        assert all((side.int().diff() != 0).sum() <= 2 for side in (rows, columns))
        areas.append(painted.float().mean().item())
    assert min(areas) > 0.01 and max(areas) < 0.37
    assert sum(areas) / len(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = found[found != IMAGES].float()
    assert noise.mean() == pytest.approx(127.5, abs=2) and noise.std() == pytest.approx(73.9, abs=1.5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_random_erasing_is_drawn_with_its_probability(p):
    touched = (RandomErasing(p)(IMAGES, rng_of()) != IMAGES).flatten(1).any(1).float().mean()
    assert touched.item() == pytest.approx(p, abs=0.08)


@pytest.mark.parametrize("operation", [ColorJitter(0.4), RandomErasing(0.5)], ids=lambda op: type(op).__name__)
class TestEachOperation:
    def test_an_image_does_not_depend_on_its_batch(self, operation):
        whole = apply_view((operation,), IMAGES, rng_of())
        for part in (slice(0, 1), slice(3, 20), torch.tensor([7, 3, 3, 39])):
            assert torch.equal(apply_view((operation,), IMAGES[part], rng_of(INDEX[part])), whole[part])

    def test_the_input_stays_as_it_is(self, operation):
        before = IMAGES.clone()
        assert not torch.equal(apply_view((operation,), IMAGES, rng_of()), before)
        assert torch.equal(IMAGES, before)

    def test_it_uses_the_slots_it_says(self, operation):
        used = set()

        class Probe(Draws):
            def uniform(self, slot):
                used.add(slot)
                return super().uniform(slot)

        operation(IMAGES, Probe(rng_of().state))
        assert max(used) < operation.slots
