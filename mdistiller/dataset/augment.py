"""Operations of today's strong recipes that may follow a data set's weak view: colour jitter, random erasing.

They are view operations, see :mod:`mdistiller.dataset.views`; RandAugment is in a file of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.functional import draws

from .views import Draws

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, as in Pillow


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, in this order, each changed by a factor from ``1 - strength`` to
    ``1 + strength``.

    Args:
        strength: above 0, at most 1.
    """

    strength: float
    slots = 3

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        factors = [1 + self.strength * (2 * rng.uniform(slot) - 1) for slot in range(3)]
        brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors)
        bright = (images.float() * brightness).clamp(0, 255)
        level = _grey(bright).mean((2, 3), keepdim=True)
        contrasted = (level + contrast * (bright - level)).clamp(0, 255)
        grey = _grey(contrasted)
        return (grey + saturation * (contrasted - grey)).clamp(0, 255).round().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


@dataclass(frozen=True)
class RandomErasing:
    """With probability ``p`` a rectangle painted over with noise (Zhong et al., arXiv:1708.04896, as timm draws it).

    Its area is 2 % to a third of the image's, its height by its width 0.3 to 1 / 0.3, uniform in the logarithm; a
    side that would be longer than the image's ends there. Each painted value is a grey level from 0 to 255.
    """

    p: float
    slots = 6  # whether, area, proportions, row, column, noise

    def __call__(self, images: Tensor, rng: Draws) -> Tensor:
        height, width = images.shape[2:]
        area = height * width * (0.02 + (1 / 3 - 0.02) * rng.uniform(1))
        aspect = torch.exp(math.log(0.3) * (2 * rng.uniform(2) - 1))
        rows = self._span((area * aspect).sqrt(), rng.uniform(3), height)
        columns = self._span((area / aspect).sqrt(), rng.uniform(4), width)
        erased = rows[:, :, None] & columns[:, None, :] & (rng.uniform(0) < self.p)[:, None, None]
        place = torch.arange(images[0].numel(), device=images.device)
        start = draws.hash_keys(rng.first + 5, start=rng.state)
        noise = draws.integers(0, 256, place, start=start[:, None]).view(images.shape).to(torch.uint8)
        return torch.where(erased[:, None], noise, images)

    @staticmethod
    def _span(side: Tensor, uniform: Tensor, size: int) -> Tensor:
        """Which of the ``size`` rows or columns are painted, ``(B, size)`` bool."""
        side = side.round().clamp(1, size)
        start = (uniform * (size - side + 1)).floor()[:, None]
        position = torch.arange(size, device=side.device)
        return (position >= start) & (position < start + side[:, None])
