"""RandAugment in TorchSSL's manner, for a batch in which every image has its own operations.

Xu et al. (VRM), supplement 8.2, which takes it from TorchSSL (Zhang et al. FlexMatch. NeurIPS 2021), after
Cubuk et al. RandAugment. arXiv:1909.13719. Per image ``n`` of 14 operations, drawn with replacement and
always applied; the magnitude is uniform in the operation's range; nearest neighbour, black outside.

The arithmetic is Pillow's, step by step, and so are the results, to the grey level. One exception: Pillow
places a pure translation in double precision and this file, like Pillow's other maps, in 16-bit fixed
point, so that a shift within 2**-17 below half a pixel rounds the other way (1 in 130,000).

An operation is of one of three kinds, and the kinds' last steps are shared, which makes the batch fast:

- tables: each channel goes through a table of 256 grey levels, and one gather serves all of them;
- maps: each output pixel is fetched from where an affine map says, one gather again;
- images: nothing is shared; two operations mix the image with a flatter version of itself, one returns it.

Legend: b images of the batch that drew the operation, C channels, H height, W width; ``magnitude`` is
``(b,)`` float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .views import Draws, take_pixels


class Transform(NamedTuple):
    """One of the 14: its name, range of magnitudes, kind (see the file's docstring) and function."""

    name: str
    low: float
    high: float
    kind: str
    function: Callable[[Tensor, Tensor], Tensor]

    def magnitude(self, level: Tensor) -> Tensor:
        """``(b,)`` float64: ``level`` 0 is the low, 1 the high end of the range."""
        return level.double() * (self.high - self.low) + self.low


@dataclass(frozen=True)
class RandAugment:
    """``n`` of :data:`TRANSFORMS` one after the other, drawn for each image."""

    n: int = 2

    @property
    def slots(self) -> int:
        return 2 * self.n  # which, how strong

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        for turn in range(self.n):
            choice = rng.integers(2 * turn, 0, len(TRANSFORMS))
            images = transform_images(images, choice, rng.uniform(2 * turn + 1))
        return images


def transform_images(images: Tensor, choice: Tensor, level: Tensor) -> Tensor:
    """Each image after its own transformation.

    Args:
        images: ``(B, 3, H, W)`` uint8, not changed.
        choice: ``(B,)`` positions in :data:`TRANSFORMS`.
        level: ``(B,)`` in [0, 1], from the low to the high end of the range of magnitudes.
    """
    return _transform_in_groups(images, choice, level) if images.is_cpu else _transform_by_masks(images, choice, level)


def _transform_in_groups(images: Tensor, choice: Tensor, level: Tensor) -> Tensor:
    """Each transformation on the images that drew it. How many drew which must be known: a GPU would be waited for."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in FINISH}
    for transform, rows in zip(TRANSFORMS, _rows_by_choice(choice), strict=True):
        if len(rows):
            chosen = images.index_select(0, rows)
            magnitude = transform.magnitude(level.index_select(0, rows))
            parts[transform.kind].append((rows, transform.function(chosen, magnitude)))
    done = []
    for kind, found in parts.items():
        if found:
            rows, results = _joined(found)
            done.append((rows, FINISH[kind](images.index_select(0, rows), results)))
    rows, results = _joined(done)
    # Back in order. Faster than index_copy into a clone, which moves single bytes.
    return results.index_select(0, rows.argsort())


def _transform_by_masks(images: Tensor, choice: Tensor, level: Tensor) -> Tensor:
    """Apply each transformation to all images and select: more work, but no wait for the device."""
    batch, channels = images.shape[:2]
    results = {
        "table": _levels(images).to(torch.uint8).expand(batch, channels, -1),
        "map": _identity_map_with(0, torch.ones_like(level, dtype=torch.float64)),
        "image": images,
    }
    of_kind = {kind: torch.zeros_like(choice, dtype=torch.bool) for kind in FINISH}
    for position, transform in enumerate(TRANSFORMS):
        drawn = choice == position
        kind = transform.kind
        found = transform.function(images, transform.magnitude(level))
        results[kind] = torch.where(drawn.view(-1, *[1] * (found.ndim - 1)), found, results[kind])
        of_kind[kind] = of_kind[kind] | drawn
    for kind, finish in FINISH.items():
        images = torch.where(of_kind[kind][:, None, None, None], finish(images, results[kind]), images)
    return images


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows, results = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(results)


def _rows_by_choice(choice: Tensor) -> tuple[Tensor, ...]:
    """For each transformation the positions of the images that drew it."""
    counts = choice.bincount(minlength=len(TRANSFORMS)).tolist()
    return choice.argsort(stable=True).split(counts)


# Tables: (b, C, 256) uint8


def autocontrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Each channel stretched so that its darkest level becomes 0 and its brightest 255."""
    low, high = images.flatten(2).aminmax(dim=2, keepdim=True)
    low, high = low.double(), high.double()
    levels = _levels(images).double()
    scale = torch.full_like(low, 255) / (high - low)  # a number / tensor would multiply by the reciprocal
    stretched = (levels * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mixed with black."""
    levels = _levels(images).float()
    return _for_all_channels(_blend(0 * levels, levels, magnitude[:, None, None]), images)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mixed with the mean grey level of the image, rounded."""
    grey = _grey(images).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    table = _blend(mean[:, None, None].float(), _levels(images).float(), magnitude[:, None, None])
    return _for_all_channels(table, images)


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Each channel's histogram flattened: a level becomes the share of darker pixels, in whole steps.

    A channel stays as it is where a step would be less than one pixel (images under 16x16) or where it has
    a single level.
    """
    pixels = images.flatten(2).long()
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = count.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    darker = count.cumsum(2) - count
    flattened = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, flattened, _levels(images)).to(torch.uint8)


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Only the highest ``floor(magnitude)`` bits kept."""
    dropped = 8 - magnitude.long()[:, None, None]
    return _for_all_channels(_levels(images) >> dropped << dropped, images)


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Levels of at least the magnitude inverted."""
    levels = _levels(images)
    table = torch.where(levels < magnitude[:, None, None], levels, 255 - levels)
    return _for_all_channels(table, images)


def apply_tables(images: Tensor, tables: Tensor) -> Tensor:
    """``out[b, c, y, x] = tables[b, c, images[b, c, y, x]]``."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


# Maps: (b, 6) float64, the input pixel (a x + b y + c, d x + e y + f) of the output pixel (x, y)


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Counter-clockwise about the centre, in degrees."""
    height, width = images.shape[2:]
    angle = -torch.deg2rad(magnitude)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], dim=1)


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    return _identity_map_with(1, magnitude)


def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    return _identity_map_with(3, magnitude)


def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """The magnitude is a share of the width, positive to the left."""
    return _identity_map_with(2, magnitude * images.shape[3])


def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """The magnitude is a share of the height, positive upwards."""
    return _identity_map_with(5, magnitude * images.shape[2])


def apply_maps(images: Tensor, maps: Tensor) -> Tensor:
    """Nearest neighbour, black outside, in Pillow's 16-bit fixed-point arithmetic."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = maps.unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]

    def source(along_x: Tensor, along_y: Tensor, offset: Tensor) -> Tensor:
        offset = offset + along_x * 0.5 + along_y * 0.5  # pixel centres
        fixed = torch.stack([along_x, along_y, offset]).mul(65536).add(0.5).floor().long()
        along_x, along_y, offset = fixed[..., None, None]
        return (along_x * x + (along_y * y + offset)) >> 16

    column, row = source(a, b, c), source(d, e, f)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = (row * width + column).mul_(inside)
    return take_pixels(images, pixel).mul_(inside[:, None])


# Images: (b, C, H, W) uint8


def identity(images: Tensor, magnitude: Tensor) -> Tensor:
    return images


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mixed with its grey version."""
    return _blend(_grey(images)[:, None].float(), images.float(), magnitude[:, None, None, None])


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mixed with its smoothed version: mean of the 3x3 neighbours, the centre counted five times."""
    images = images.float()
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * images[:, :, 1:-1, 1:-1]
    smooth = images.clone()  # the border pixels stay
    smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(smooth, images, magnitude[:, None, None, None])


def _levels(images: Tensor) -> Tensor:
    """0 .. 255, ``(1, 1, 256)`` int64."""
    return torch.arange(256, device=images.device).view(1, 1, 256)


def _for_all_channels(table: Tensor, images: Tensor) -> Tensor:
    """``(b, 1, 256)`` -> ``(b, C, 256)`` uint8."""
    return table.to(torch.uint8).expand(-1, images.shape[1], -1)


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601 luma in 16-bit fixed point, ``(b, H, W)`` int32."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(flat: Tensor, image: Tensor, share: Tensor) -> Tensor:
    """From ``flat`` (share 0) to ``image`` (share 1), truncated to uint8; float32 as in Pillow."""
    return (flat + share.float() * (image - flat)).to(torch.uint8)


def _identity_map_with(position: int, values: Tensor) -> Tensor:
    maps = values.new_zeros(len(values), 6)
    maps[:, 0:5:4].fill_(1)
    maps[:, position] = values
    return maps


FINISH = {"table": apply_tables, "map": apply_maps, "image": lambda images, results: results}

TRANSFORMS = (
    Transform("AutoContrast", 0, 1, "table", autocontrast),
    Transform("Brightness", 0.05, 0.95, "table", brightness),
    Transform("Color", 0.05, 0.95, "image", color),
    Transform("Contrast", 0.05, 0.95, "table", contrast),
    Transform("Equalize", 0, 1, "table", equalize),
    Transform("Identity", 0, 1, "image", identity),
    Transform("Posterize", 4, 8, "table", posterize),
    Transform("Rotate", -30, 30, "map", rotate),
    Transform("Sharpness", 0.05, 0.95, "image", sharpness),
    Transform("ShearX", -0.3, 0.3, "map", shear_x),
    Transform("ShearY", -0.3, 0.3, "map", shear_y),
    Transform("Solarize", 0, 256, "table", solarize),
    Transform("TranslateX", -0.3, 0.3, "map", translate_x),
    Transform("TranslateY", -0.3, 0.3, "map", translate_y),
)
