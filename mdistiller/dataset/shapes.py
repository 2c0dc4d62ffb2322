"""Shapes: drawn images in 100 classes, as many as one likes, without a download.

A class is one of ten outlines filled with one of ten patterns: ``label = 10 * outline + pattern``. All else is
chance: place, size, turn, stretch and colours of the object, the background, smaller objects of other classes
around and upon it, and noise. Colours say nothing, both parts of a class have to be seen, and every outline and
pattern is its own mirror image, so that views may flip.

The images are part of the data set: image ``i`` of a split depends on nothing but ``i`` and the image size, and a
larger split begins with the smaller one. They are computed with operations that IEEE 754 defines to the last bit
(``+ - * /``, square root, rounding, comparison), hence the same on every machine and device.

Legend: b images, S pixels a side. Coordinates run from -1 to 1 across the image, y downwards; an object's own
coordinates are turned and scaled with it, and its outline lies at gauge 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mdistiller.functional import draws
from mdistiller.options import MANY, Option

from .base import DataSet, Split, register_dataset
from .randaugment import RandAugment
from .views import Cutout, Draws, HorizontalFlip, RandomCrop, View, name_key, rotations

CHUNK = 250  # images drawn at once: what is computed stays in the processor's cache
ANGLES = 1024  # steps of a full turn
DISTRACTORS = 2  # small objects behind the object
OCCLUDERS = 1  # small objects upon it
NOISE = 16.0  # grey levels at most


@register_dataset("shapes")
class Shapes(DataSet):
    """Views as for CIFAR-100."""

    num_classes = 100
    image_size = 32
    mean = (0.4992, 0.4990, 0.4985)
    std = (0.2344, 0.2345, 0.2347)
    model_family = "cifar"
    views: ClassVar[dict[str, View]] = {
        "plain": (),
        "weak": (RandomCrop(), HorizontalFlip()),
        "strong": (RandomCrop(), HorizontalFlip(), RandAugment(n=2), Cutout()),
        **rotations((RandomCrop(), HorizontalFlip())),
    }
    defaults: ClassVar[dict[str, Option]] = {
        "TRAIN_SIZE": Option(20_000, "training images", at_least=num_classes, at_most=MANY, role="data"),
        "TEST_SIZE": Option(2_000, "test images", at_least=num_classes, at_most=MANY, role="data"),
    }

    def load(self) -> tuple[Split, Split]:
        return tuple(draw_split(name, self.options[f"{name}_size"], self.image_size) for name in ("train", "test"))


def draw_split(name: str, count: int, image_size: int) -> Split:
    """The first ``count`` images of a split; class ``i % 100`` is that of image ``i``."""
    index = torch.arange(count)
    labels = index % Shapes.num_classes
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for part in index.split(CHUNK):
        rng = Draws(draws.hash_keys(name_key(f"shapes {name}"), part))
        images[part[0] : part[-1] + 1] = draw_images(labels[part], rng, image_size)
    return Split(images, labels)


def draw_images(labels: Tensor, rng: Draws, size: int) -> Tensor:
    """One image of each class given.

    Args:
        labels: ``(b,)`` in 0 .. 99.
        rng: of ``b`` images; says all that the label does not.
        size: S.

    Returns:
        ``(b, 3, S, S)`` uint8.
    """
    middle = (torch.arange(size, device=labels.device, dtype=torch.float32) * 2 + (1 - size)) / size
    grid = torch.stack([middle.expand(size, size), middle[:, None].expand(size, size)])  # x, y
    color = rng.integers(0, 0, 256), rng.integers(1, 0, 256), rng.integers(2, 0, 256)
    main_color = torch.stack(color, dim=1)
    rng = rng.skip(3)
    canvas = _background(other_color(main_color, rng), rng.skip(4), grid)
    rng = rng.skip(4 + 6)
    for _ in range(DISTRACTORS):
        canvas = paint(canvas, grid, *_small_object(rng))
        rng = rng.skip(OBJECT_SLOTS)
    shape, pattern = labels // 10, labels % 10
    canvas = paint(canvas, grid, shape, pattern, _placed(rng, (0.55, 0.9), 0.2, ANGLES // 8), _colors(main_color, rng))
    rng = rng.skip(OBJECT_SLOTS)
    for _ in range(OCCLUDERS):
        canvas = paint(canvas, grid, *_small_object(rng))
        rng = rng.skip(OBJECT_SLOTS)
    return _noisy(canvas, rng)


class Placement(NamedTuple):
    """Where objects lie, each field ``(b,)`` float32."""

    x: Tensor
    y: Tensor
    radius: Tensor
    cos: Tensor
    sin: Tensor
    stretch: Tensor  # of the object's own x axis; the y axis shrinks as much
    cos_pattern: Tensor  # the pattern is turned against the object
    sin_pattern: Tensor
    period: Tensor  # of repeating patterns, in radii
    phase_x: Tensor
    phase_y: Tensor


PLACEMENT_SLOTS = 9
OBJECT_SLOTS = PLACEMENT_SLOTS + 3 + 4 + 2  # with a first and a second colour, outline and pattern


def _placed(rng: Draws, radius: tuple[float, float], spread: float, turn: int) -> Placement:
    """Drawn uniformly: radius in its range, middle within ``spread`` of the image's, turn up to ``turn`` steps."""

    def within(slot: int, low: float, high: float) -> Tensor:
        return rng.uniform(slot) * (high - low) + low

    turned, pattern_turned = rng.integers(3, -turn, turn + 1) % ANGLES, rng.integers(4, 0, ANGLES)
    cosine = torch.tensor([math.cos(2 * math.pi * i / ANGLES) for i in range(ANGLES)], device=turned.device)
    quarter = ANGLES // 4
    return Placement(
        x=within(0, -spread, spread),
        y=within(1, -spread, spread),
        radius=within(2, *radius),
        cos=cosine[turned],
        sin=cosine[(turned - quarter) % ANGLES],
        stretch=within(5, 0.87, 1.15),
        cos_pattern=cosine[pattern_turned],
        sin_pattern=cosine[(pattern_turned - quarter) % ANGLES],
        period=within(6, 0.4, 0.65),
        phase_x=rng.uniform(7),
        phase_y=rng.uniform(8),
    )


def _small_object(rng: Draws) -> tuple[Tensor, Tensor, Placement, Tensor]:
    """Outline, pattern, placement, colours: anything, anywhere."""
    first = torch.stack([rng.integers(PLACEMENT_SLOTS + channel, 0, 256) for channel in range(3)], dim=1)
    shape = rng.integers(PLACEMENT_SLOTS + 7, 0, 10)
    pattern = rng.integers(PLACEMENT_SLOTS + 8, 0, 10)
    return shape, pattern, _placed(rng, (0.12, 0.3), 1.0, ANGLES // 2), _colors(first, rng)


def _colors(first: Tensor, rng: Draws) -> Tensor:
    """``(b, 2, 3)``: the two colours of an object."""
    return torch.stack([first, other_color(first, rng.skip(PLACEMENT_SLOTS + 3))], dim=1)


def other_color(color: Tensor, rng: Draws) -> Tensor:
    """A random colour that differs from ``color``, ``(b, 3)``, by 64 levels or more in one channel. Four slots."""
    shift = torch.stack([rng.integers(channel, 0, 256) for channel in range(3)], dim=1)
    sure = torch.nn.functional.one_hot(rng.integers(3, 0, 3), 3).bool()
    return (color + torch.where(sure, shift // 2 + 64, shift)) % 256


def _background(color: Tensor, rng: Draws, grid: Tensor) -> Tensor:
    """``(b, 3, S, S)`` float32: from one colour to another across the image. Six slots."""
    end = other_color(color, rng)
    x, y = rng.uniform(4) - 0.5, rng.uniform(5) - 0.5
    share = (grid[0] * x[:, None, None] + grid[1] * y[:, None, None]) + 0.5
    return _mixed(color.float()[:, :, None, None], end.float()[:, :, None, None], share[:, None])


def paint(canvas: Tensor, grid: Tensor, shape: Tensor, pattern: Tensor, place: Placement, colors: Tensor) -> Tensor:
    """The canvas with an object upon each image.

    Args:
        canvas: ``(b, 3, S, S)`` float32 levels.
        grid: ``(2, S, S)`` coordinates x, y.
        shape, pattern: ``(b,)`` positions in :data:`OUTLINES` and :data:`PATTERNS`.
        place: see :class:`Placement`.
        colors: ``(b, 2, 3)``.
    """
    wide = Placement(*(field[:, None, None] for field in place))
    x, y = (grid[0] - wide.x) / wide.radius, (grid[1] - wide.y) / wide.radius
    x, y = (x * wide.cos + y * wide.sin) / wide.stretch, (y * wide.cos - x * wide.sin) * wide.stretch
    gauge = _by_kind(OUTLINES, shape, x, y)
    pixels = wide.radius * (grid.shape[1] / 2)  # in a radius: soft edges are a pixel wide
    turned = x * wide.cos_pattern + y * wide.sin_pattern, y * wide.cos_pattern - x * wide.sin_pattern
    share = _by_kind(PATTERNS, pattern, *turned, gauge, *(f.expand_as(x[:, :1, :1]) for f in (
        wide.period, wide.phase_x, wide.phase_y, pixels)))  # fmt: skip
    first, second = colors.float()[..., None, None].unbind(1)
    filled = _mixed(first, second, share[:, None])
    return _mixed(canvas, filled, ((1 - gauge) * pixels + 0.5)[:, None])


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return first + (second - first) * share.clamp(0, 1)


def _by_kind(kinds: tuple[Callable[..., Tensor], ...], choice: Tensor, *values: Tensor) -> Tensor:
    """``kinds[choice[i]]`` of the i-th entry of each value."""
    result = torch.empty_like(values[0])
    for number, function in enumerate(kinds):
        rows = (choice == number).nonzero()[:, 0]
        result[rows] = function(*(value[rows] for value in values))
    return result


def _noisy(canvas: Tensor, rng: Draws) -> Tensor:
    """Noise of triangular distribution, and rounding."""
    size = canvas.shape[-1]
    pixel = torch.arange(size * size, device=canvas.device).view(size, size)
    state = draws.hash_keys(rng.first, start=rng.state)[:, None, None]
    bits = draws.hash_keys(pixel, start=state)
    parts = torch.stack([(bits >> (10 * i)) & 1023 for i in range(6)], dim=1).float()
    noise = (parts[:, :3] - parts[:, 3:]) * (NOISE / 1024)
    return (canvas + noise + 0.5).floor().clamp(0, 255).to(torch.uint8)


# Outlines: gauges (b, S, S), 0 at the middle and 1 at the outline


def _directions(count: int) -> list[tuple[float, float]]:
    """Unit vectors, the first of them upwards."""
    return [(math.sin(2 * math.pi * i / count), -math.cos(2 * math.pi * i / count)) for i in range(count)]


def _sides(count: int, x: Tensor, y: Tensor, distance: float) -> Tensor:
    """``(count, b, S, S)``: how far each side of a regular polygon is reached, 1 at the side."""
    return torch.stack([(x * dx + y * dy) / distance for dx, dy in _directions(count)])


def disc(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() / 0.85


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) / 0.75


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return _sides(3, x, y, 0.55).amax(0)


def pentagon(x: Tensor, y: Tensor) -> Tensor:
    return _sides(5, x, y, 0.75).amax(0)


def star_of_five(x: Tensor, y: Tensor) -> Tensor:
    """Within four sides of a pentagon at least."""
    return _sides(5, x, y, 0.4).topk(2, dim=0).values[1]


def star_of_six(x: Tensor, y: Tensor) -> Tensor:
    """Two triangles."""
    sides = _sides(6, x, y, 0.52)
    return torch.minimum(sides[0::2].amax(0), sides[1::2].amax(0))


def cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x / 0.3, y / 0.95), torch.maximum(x / 0.95, y / 0.3))


def _discs(count: int, x: Tensor, y: Tensor, distance: float, radius: float) -> Tensor:
    squares = [(x - dx * distance) * (x - dx * distance) + (y - dy * distance) * (y - dy * distance)
               for dx, dy in _directions(count)]  # fmt: skip
    return torch.stack(squares).amin(0).sqrt() / radius


def trefoil(x: Tensor, y: Tensor) -> Tensor:
    return _discs(3, x, y, 0.45, 0.48)


def quatrefoil(x: Tensor, y: Tensor) -> Tensor:
    return _discs(4, x, y, 0.5, 0.44)


def half_disc(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.35
    return torch.maximum((x * x + y * y).sqrt() / 0.95, -(y - 0.4) / 0.4)


OUTLINES = (disc, square, triangle, pentagon, star_of_five, star_of_six, cross, trefoil, quatrefoil, half_disc)


# Patterns: the share (b, S, S) of the second colour; values beyond 0 .. 1 are cut off


def _wave(position: Tensor) -> Tensor:
    """A triangle wave of period 1 from -0.5 to 0.5."""
    return (position - position.floor() - 0.5).abs() * 2 - 0.5


def plain(x, y, gauge, period, phase_x, phase_y, pixels):
    return torch.zeros_like(x)


def border(x, y, gauge, period, phase_x, phase_y, pixels):
    return (gauge - 0.65) * pixels + 0.5


def spot(x, y, gauge, period, phase_x, phase_y, pixels):
    return (0.3 - (x * x + y * y).sqrt()) * pixels + 0.5


def half(x, y, gauge, period, phase_x, phase_y, pixels):
    return x * pixels + 0.5


def gradient(x, y, gauge, period, phase_x, phase_y, pixels):
    return x * 0.65 + 0.5


def stripes(x, y, gauge, period, phase_x, phase_y, pixels):
    return _wave(x / period + phase_x) * (pixels * period / 2) + 0.5


def checks(x, y, gauge, period, phase_x, phase_y, pixels):
    sharpness = pixels * period
    across = (_wave(x / period + phase_x) * sharpness).clamp(-1, 1)
    return across * (_wave(y / period + phase_y) * sharpness).clamp(-1, 1) * 0.5 + 0.5


def dots(x, y, gauge, period, phase_x, phase_y, pixels):
    x, y = x / period + phase_x, y / period + phase_y
    x, y = x - x.floor() - 0.5, y - y.floor() - 0.5
    return (0.33 - (x * x + y * y).sqrt()) * (pixels * period) + 0.5


def rings(x, y, gauge, period, phase_x, phase_y, pixels):
    return _wave((x * x + y * y).sqrt() / period + phase_x) * (pixels * period / 2) + 0.5


def quarters(x, y, gauge, period, phase_x, phase_y, pixels):
    return (x * pixels).clamp(-1, 1) * (y * pixels).clamp(-1, 1) * 0.5 + 0.5


PATTERNS = (plain, border, spot, half, gradient, stripes, checks, dots, rings, quarters)
