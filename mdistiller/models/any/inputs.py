"""Input transformations of networks: a batch is made once, and each network resizes and normalises it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.registry import check_choice

RESIZE = ("antialias", "bilinear", "bicubic", "nearest")


class Input(nn.Module):
    """``x -> resized(x) * scale + shift``; a module without entries in the state dict.

    The data set's mean and std normalise the images; this module changes them to the network's own: ``scale`` is
    ``std_data / std_network``, ``shift`` is ``(mean_data - mean_network) / std_network``.

    Args:
        size: side in pixels; 0: unchanged.
        resize: ``"antialias"`` (bilinear, with the filter that shrinking needs), or torch's ``"bilinear"``,
            ``"bicubic"`` and ``"nearest"``.
        data: mean and std of the data set, for each channel.
        own: mean and std of the network; ``None``: the data set's.
    """

    def __init__(
        self,
        size: int = 0,
        resize: str = "antialias",
        data: tuple[Sequence[float], Sequence[float]] | None = None,
        own: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.resize = size, check_choice("resize", resize, RESIZE)
        self.normalises = own is not None and data is not None and _rounded(own) != _rounded(data)
        if self.normalises:
            (mean_d, std_d), (mean_n, std_n) = (torch.tensor(pair, dtype=torch.float64) for pair in (data, own))
            self.register_buffer("scale", _per_channel(std_d / std_n), persistent=False)
            self.register_buffer("shift", _per_channel((mean_d - mean_n) / std_n), persistent=False)

    def described(self, side: int) -> str:
        """The transformation of images of ``side`` pixels in words, for the log."""
        parts = []
        if self.size and self.size != side:
            parts.append(f"images are resized from {side} to {self.size} pixels ({self.resize})")
        if self.normalises:
            parts.append("normalised by the network's own mean and std")
        return " and ".join(parts)

    def forward(self, image: Tensor) -> Tensor:
        if self.size and image.shape[2:] != (self.size, self.size):
            mode = "bilinear" if self.resize == "antialias" else self.resize
            corners = None if mode == "nearest" else False
            antialias = self.resize == "antialias"
            image = F.interpolate(image, (self.size,) * 2, mode=mode, align_corners=corners, antialias=antialias)
        return image * self.scale + self.shift if self.normalises else image


def _rounded(pair: tuple[Sequence[float], Sequence[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in values] for values in pair]


def _per_channel(values: Tensor) -> Tensor:
    return values.float()[None, :, None, None]
