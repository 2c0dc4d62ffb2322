"""From the bytes of a file to the windows that views ask for: a picture is decoded once for all views.

JPEGs are decoded by ``torchvision.io``, other files and what it refuses by Pillow. Windows are scaled by
``F.interpolate`` on bytes, bilinear and antialiased, which differs from Pillow by a grey level, rarely by two. A large
JPEG may be decoded at a half, a quarter or an eighth of its size, if all windows are to be made smaller by more.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .images import Images

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that a later version lacks it
    decode_jpeg = None

ORIENTATION = 0x0112  # of EXIF; the values from 5 on swap width and height
REDUCTIONS = (8, 4, 2)


class Cut(NamedTuple):
    """A window of a picture, scaled, then cropped; in pixels."""

    left: int
    top: int
    width: int
    height: int
    scaled: tuple[int, int]  # height and width
    offset: tuple[int, int] = (0, 0)  # top and left of the crop in the scaled window

    @property
    def reduction(self) -> float:
        """How many pixels of the picture make one pixel of the scaled window, along a side."""
        return min(self.height / self.scaled[0], self.width / self.scaled[1])


class Cutter(Protocol):
    """A view's first operation that takes a window of each picture."""

    slots: int

    def cut(self, width: int, height: int, size: tuple[int, int], drawn: Sequence[float]) -> Cut:
        """The window in a picture of that width and height.

        Args:
            width: of the picture.
            height: of the picture.
            size: height and width of the result.
            drawn: ``slots`` numbers in [0, 1).
        """


class Decoded:
    """A picture in memory."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.size = picture, picture.size

    def pixels(self, reduction: float) -> Tensor:
        return as_rgb(self.picture)


class Encoded:
    """A picture of which only the header has been read.

    Args:
        data: of the file.
        photograph: turn the picture as its EXIF says, and reduce a large one while it is decoded.

    Raises:
        Exception: of Pillow, for bytes that are no picture or a very large one.
    """

    def __init__(self, data: bytes, photograph: bool) -> None:
        self.data, self.photograph = data, photograph
        self.picture = Image.open(io.BytesIO(data))
        turned = photograph and self.picture.getexif().get(ORIENTATION, 1) >= 5
        self.size = self.picture.size[::-1] if turned else self.picture.size

    def pixels(self, reduction: float = 1) -> Tensor:
        """``(3, H, W)`` uint8, of ``size`` or reduced by a factor that is at most ``reduction``.

        Raises:
            Exception: of Pillow, for a damaged file.
        """
        picture = self.picture
        if picture.format == "JPEG" and picture.mode in ("RGB", "L"):
            factor = next((factor for factor in REDUCTIONS if factor <= reduction), 1) if self.photograph else 1
            if factor > 1:
                picture.draft("RGB", tuple(side // factor for side in picture.size))
            elif decode_jpeg is not None:
                try:
                    data = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
                    return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=self.photograph)
                except RuntimeError:
                    pass  # Pillow may read it, or says what is wrong
        return as_rgb(ImageOps.exif_transpose(picture) if self.photograph else picture)


def as_rgb(picture: Image.Image) -> Tensor:
    """``(3, H, W)`` uint8; of levels with 16 bits the upper 8, of an animation the first picture.

    Raises:
        ValueError: levels are floating-point numbers, whose range is not known.
    """
    if picture.mode == "F":
        raise ValueError("its levels are floating-point numbers, and white is not known")
    if picture.mode.startswith("I"):
        level = np.asarray(picture).astype(np.int64).clip(0, 2**16 - 1) >> 8
        return torch.from_numpy(level.astype(np.uint8)).expand(3, -1, -1)
    if picture.mode == "P" and "transparency" in picture.info:  # else Pillow warns
        picture = picture.convert("RGBA")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def cut_views(images: Images, wanted: Sequence[tuple[Cutter, Any]]) -> list[Tensor]:
    """For each view the windows of N pictures, ``(N, 3, H, W)`` uint8. Each picture is decoded once.

    Args:
        images: N of them.
        wanted: each view's first operation and its :class:`~mdistiller.dataset.views.Draws`.

    Raises:
        InputError: a file that cannot be read; names the file.
    """
    drawn = []
    for cutter, rng in wanted:
        numbers = [rng.uniform(slot) for slot in range(cutter.slots)]
        drawn.append(torch.stack(numbers, 1).tolist() if numbers else [()] * len(images))
    found = [
        torch.empty((len(images), *images.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for _ in wanted
    ]  # in the layout in which pictures are decoded and scaled

    def cut_one(position: int, picture: Decoded | Encoded) -> None:
        cuts = [
            cutter.cut(*picture.size, images.size, numbers[position])
            for (cutter, _), numbers in zip(wanted, drawn, strict=True)
        ]
        pixels = picture.pixels(min(cut.reduction for cut in cuts))
        for cut, views in zip(cuts, found, strict=True):
            views[position] = window(pixels, cut, picture.size, images.size)

    each_picture(images, cut_one)
    return [views.to(images.device) for views in found]


def each_picture(images: Images, use: Callable[[int, Any], None]) -> None:
    """Call ``use(position, picture)`` for each image; ``picture`` has ``size`` and ``pixels(reduction)``."""
    if hasattr(images, "use_each"):
        images.use_each(use)
    else:
        for position, picture in enumerate(images.pictures()):
            use(position, Decoded(picture))


def window(pixels: Tensor, cut: Cut, whole: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``(3, *size)`` uint8.

    Args:
        pixels: of the picture, ``(3, H, W)``, perhaps reduced.
        cut: in the picture as it is.
        whole: width and height of the picture as it is.
        size: height and width of the result.
    """
    factor = max(1, round(whole[0] / pixels.shape[2]))  # a reduced picture's last pixel may lie partly outside
    top, left = (min(x // factor, side - 1) for x, side in zip((cut.top, cut.left), pixels.shape[1:], strict=True))
    bottom, right = (round(x / factor) for x in (cut.top + cut.height, cut.left + cut.width))
    found = pixels[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
    if found.shape[2:] != cut.scaled:
        found = found.contiguous(memory_format=torch.channels_last)  # twice as fast
        found = F.interpolate(found, cut.scaled, mode="bilinear", antialias=True)
    y, x = cut.offset
    return found[0, :, y : y + size[0], x : x + size[1]]
