"""Every operation of RandAugment against Pillow, whose arithmetic is the oracle."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mdistiller.dataset.randaugment import (
    TRANSFORMS,
    RandAugment,
    _transform_by_masks,
    _transform_in_groups,
    transform_images,
)
from mdistiller.dataset.views import Cutout, Draws, HorizontalFlip, RandomCrop, apply_view


def affine(image, coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


ORACLES = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Identity": lambda image, v: image,
    "Posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "Rotate": lambda image, v: image.rotate(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "ShearX": lambda image, v: affine(image, (1, v, 0, 0, 1, 0)),
    "ShearY": lambda image, v: affine(image, (1, 0, 0, v, 1, 0)),
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "TranslateX": lambda image, v: affine(image, (1, 0, v * image.size[0], 0, 1, 0)),
    "TranslateY": lambda image, v: affine(image, (1, 0, 0, 0, 1, v * image.size[1])),
}
RANGES = {  # supplement 8.2; the three without a magnitude have 0 to 1
    "AutoContrast": (0, 1), "Brightness": (0.05, 0.95), "Color": (0.05, 0.95), "Contrast": (0.05, 0.95),
    "Equalize": (0, 1), "Identity": (0, 1), "Posterize": (4, 8), "Rotate": (-30, 30), "Sharpness": (0.05, 0.95),
    "ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3), "Solarize": (0, 256), "TranslateX": (-0.3, 0.3),
    "TranslateY": (-0.3, 0.3),
}  # fmt: skip
NAMES = [transform.name for transform in TRANSFORMS]


def pillow(image: torch.Tensor, position: int, level: float) -> torch.Tensor:
    transform = TRANSFORMS[position]
    magnitude = level * (transform.high - transform.low) + transform.low
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(ORACLES[transform.name](picture, magnitude))).permute(2, 0, 1)


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """A third each of noise, narrow-range noise and smooth shapes, plus one flat image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    images[1::3] = images[1::3] // 5 + 60
    smooth = torch.rand(len(images[2::3]), 3, 4, 4, generator=generator) * 255
    images[2::3] = torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic").clamp(0, 255).long()
    images[0] = 77
    return images.to(torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_pillow(name, size):
    images = pictures(200, *size)
    level = torch.rand(200, generator=torch.Generator().manual_seed(1))
    level[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    position = NAMES.index(name)
    found = transform_images(images, torch.full((200,), position), level)
    expected = torch.stack([pillow(image, position, float(u)) for image, u in zip(images, level, strict=True)])
    assert (found != expected).sum() == 0


def test_the_fourteen_operations_of_the_supplement():
    assert set(NAMES) == set(ORACLES)
    assert len(NAMES) == 14


def test_each_image_gets_its_own_operation():
    images = pictures(140, 32, 32)
    choice = torch.arange(140) % 14
    level = torch.linspace(0, 0.999, 140)
    before = images.clone()
    together = transform_images(images, choice, level)
    apart = torch.cat([transform_images(images[i : i + 1], choice[i : i + 1], level[i : i + 1]) for i in range(140)])
    assert torch.equal(together, apart)
    assert torch.equal(images, before)


def test_operations_come_one_after_the_other_from_their_own_slots():
    images = pictures(60, 16, 16)
    rng = Draws.of_view("strong", 3, 5, torch.arange(60))
    expected = images
    for turn in range(2):
        choice, level = rng.integers(2 * turn, 0, 14), rng.uniform(2 * turn + 1)
        expected = torch.stack([pillow(*args) for args in zip(expected, choice.tolist(), level.tolist(), strict=True)])
    assert torch.equal(RandAugment(2)(images, rng), expected)
    assert torch.equal(RandAugment(0)(images, rng), images)


def draws_of_strong_views() -> tuple[torch.Tensor, torch.Tensor]:
    """Operation and level of both turns, for 5,000 images in four epochs."""
    rngs = [Draws.of_view("strong", 0, epoch, torch.arange(5_000)) for epoch in range(1, 5)]
    choice = torch.cat([rng.integers(2 * turn, 0, 14) for rng in rngs for turn in range(2)])
    return choice, torch.cat([rng.uniform(2 * turn + 1) for rng in rngs for turn in range(2)])


def test_all_operations_are_drawn_equally_often():
    choice, _ = draws_of_strong_views()
    expected = len(choice) / 14
    assert (choice.bincount(minlength=14) - expected).abs().max() < 5 * (expected * 13 / 14) ** 0.5


def test_the_two_turns_are_independent():
    """With replacement: all pairs of operations occur equally often."""
    first, second = draws_of_strong_views()[0].view(4, 2, -1).unbind(1)
    count = (first * 14 + second).flatten().bincount(minlength=196).double()
    chi_square = ((count - count.mean()) ** 2 / count.mean()).sum()
    assert abs(chi_square - 195) < 5 * (2 * 195) ** 0.5


@pytest.mark.parametrize("position", range(14), ids=NAMES)
def test_magnitudes_are_uniform_in_the_range(position):
    choice, level = draws_of_strong_views()
    transform = TRANSFORMS[position]
    magnitude = transform.magnitude(level[choice == position])
    low, high = RANGES[transform.name]
    assert low <= magnitude.min() and magnitude.max() < high
    share = ((magnitude - low) / (high - low)).sort().values
    steps = torch.arange(len(share)) / len(share)
    assert (share - steps).abs().max() < 2.2 / len(share) ** 0.5  # Kolmogorov-Smirnov: missed once in 8,000


@pytest.mark.parametrize("size", [(32, 32), (24, 33), (8, 8)])
def test_the_way_without_waiting_gives_the_same(size):
    """What runs on a GPU computes every operation on every image and picks; here both on the CPU."""
    images = pictures(280, *size)
    choice = torch.arange(280) % 14
    level = torch.rand(280, generator=torch.Generator().manual_seed(2))
    assert torch.equal(_transform_by_masks(images, choice, level), _transform_in_groups(images, choice, level))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    images, index = pictures(64, 32, 32).cuda(), torch.arange(64).cuda()
    view = (RandomCrop(), HorizontalFlip(), RandAugment(2), Cutout())
    apply_view(view, images, Draws.of_view("v", 1, 2, index))
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply_view(view, images, Draws.of_view("v", 1, 2, index))
    finally:
        torch.cuda.set_sync_debug_mode("default")
