"""A common training loop, as the baseline.

Pillow in worker processes, one image at a time; float32 in the default layout; meters that are read after each step.
The losses are those of our loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from mdistiller.dataset.base import Split
from mdistiller.dataset.randaugment import TRANSFORMS, RandAugment
from mdistiller.dataset.views import Cutout, HorizontalFlip, RandomCrop, View
from mdistiller.registry import InputError

Picture = Image.Image


class Numbers:
    """Random numbers with the interface of :class:`mdistiller.dataset.views.Draws`, from Python's generator."""

    def uniform(self, slot: int) -> float:
        return random.random()

    def integers(self, slot: int, low: int, high: int) -> int:
        return random.randrange(low, high)

    def skip(self, slots: int) -> Numbers:
        return self


def _affine(picture: Picture, coefficients: tuple[float, ...]) -> Picture:
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients)


# RandAugment's operations with their magnitudes, by name.
OPERATIONS: dict[str, Callable[[Picture, float], Picture]] = {
    "AutoContrast": lambda picture, v: ImageOps.autocontrast(picture),
    "Brightness": lambda picture, v: ImageEnhance.Brightness(picture).enhance(v),
    "Color": lambda picture, v: ImageEnhance.Color(picture).enhance(v),
    "Contrast": lambda picture, v: ImageEnhance.Contrast(picture).enhance(v),
    "Equalize": lambda picture, v: ImageOps.equalize(picture),
    "Identity": lambda picture, v: picture,
    "Posterize": lambda picture, v: ImageOps.posterize(picture, int(v)),
    "Rotate": lambda picture, v: picture.rotate(v),
    "Sharpness": lambda picture, v: ImageEnhance.Sharpness(picture).enhance(v),
    "ShearX": lambda picture, v: _affine(picture, (1, v, 0, 0, 1, 0)),
    "ShearY": lambda picture, v: _affine(picture, (1, 0, 0, v, 1, 0)),
    "Solarize": lambda picture, v: ImageOps.solarize(picture, v),
    "TranslateX": lambda picture, v: _affine(picture, (1, 0, v * picture.size[0], 0, 1, 0)),
    "TranslateY": lambda picture, v: _affine(picture, (1, 0, 0, 0, 1, v * picture.size[1])),
}


def _crop(operation: RandomCrop, picture: Picture, numbers: Any) -> Picture:
    width, height = picture.size
    border = height // 8 if operation.padding is None else operation.padding
    top, left = (int(numbers.integers(slot, 0, 2 * border + 1)) for slot in (0, 1))
    return ImageOps.expand(picture, border).crop((left, top, left + width, top + height))


def _flip(operation: HorizontalFlip, picture: Picture, numbers: Any) -> Picture:
    return ImageOps.mirror(picture) if float(numbers.uniform(0)) < operation.p else picture


def _rand_augment(operation: RandAugment, picture: Picture, numbers: Any) -> Picture:
    for turn in range(operation.n):
        chosen = TRANSFORMS[int(numbers.integers(2 * turn, 0, len(TRANSFORMS)))]
        level = float(numbers.uniform(2 * turn + 1))
        picture = OPERATIONS[chosen.name](picture, level * (chosen.high - chosen.low) + chosen.low)
    return picture


def _cutout(operation: Cutout, picture: Picture, numbers: Any) -> Picture:
    width, height = picture.size
    side = float(numbers.uniform(0)) * operation.max_ratio * width
    if side <= 0:
        return picture
    left = int(max(0, float(numbers.uniform(1)) * width - side / 2))
    top = int(max(0, float(numbers.uniform(2)) * height - side / 2))
    picture = picture.copy()
    picture.paste(operation.color, (left, top, min(width, int(left + side) + 1), min(height, int(top + side) + 1)))
    return picture


BY_TYPE = {RandomCrop: _crop, HorizontalFlip: _flip, RandAugment: _rand_augment, Cutout: _cutout}


def view_of(picture: Picture, view: View, numbers: Any) -> Picture:
    """A picture after all operations of a view.

    Raises:
        InputError: the view has an operation that this file does not implement with Pillow.
    """
    for operation in view:
        if type(operation) not in BY_TYPE:
            raise InputError(
                f"the baseline with Pillow knows the operations {[kind.__name__ for kind in BY_TYPE]}, not "
                f"{type(operation).__name__}; measure a method that asks for other views"
            )
        picture = BY_TYPE[type(operation)](operation, picture, numbers)
        numbers = numbers.skip(operation.slots)
    return picture


class Pictures(Dataset):
    """One image at a time: ``({field: (3, H, W)}, target, index)``.

    Args:
        split: the images.
        views: for each image field the name and the recipe of its view.
        mean, std: of the channels.
        numbers: returns the random numbers for a view's name and an index.
    """

    def __init__(
        self,
        split: Split,
        views: dict[str, tuple[str, View]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        numbers: Callable[[str, int], Any] = lambda name, index: Numbers(),
    ) -> None:
        self.arrays = np.ascontiguousarray(split.images.pixels().permute(0, 2, 3, 1).cpu().numpy())
        self.targets = split.targets.tolist()
        self.views, self.mean, self.std, self.numbers = views, mean, std, numbers

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int, int]:
        picture = Image.fromarray(self.arrays[index])
        images = {}
        for field, (name, view) in self.views.items():
            augmented = view_of(picture, view, self.numbers(name, index))
            images[field] = transforms.normalize(transforms.to_tensor(augmented), self.mean, self.std)
        return images, self.targets[index], index


class Meter:
    """Running mean of numbers."""

    def __init__(self) -> None:
        self.sum = self.count = 0.0

    def update(self, value: float, count: int) -> None:
        self.sum += value * count
        self.count += count

    @property
    def mean(self) -> float:
        return self.sum / max(self.count, 1)


def accuracy(output: Tensor, target: Tensor) -> list[float]:
    """Top-1 and top-5 in percent, as Python numbers: waits for the device."""
    hits = output.topk(min(5, output.shape[1]), 1)[1].t().eq(target[None])
    return [100 * hits[:k].any(0).float().mean().item() for k in (1, 5)]


def to_device(
    images: dict[str, Tensor], target: Tensor, index: Tensor, device: torch.device | str
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch on the networks' device."""
    images = {field: image.float().to(device) for field, image in images.items()}
    return images, target.to(device), index.to(device)


def train_epoch(
    distiller: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train an epoch. Returns the loss of each step."""
    meters = {name: Meter() for name in ("loss", "top1", "top5")}
    history = []
    distiller.train()
    for images, target, index in batches:
        optimizer.zero_grad()
        images, target, index = to_device(images, target, index, device)
        logits, losses = distiller(**images, target=target, index=index, epoch=epoch)
        loss = sum(term.mean() for term in losses.values())
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        scores = (history[-1], *accuracy(logits, target))
        for meter, value in zip(meters.values(), scores, strict=True):
            meter.update(value, len(target))
        _ = " ".join(f"{name}:{meter.mean:.3f}" for name, meter in meters.items())  # the progress bar's text
    return history


@torch.no_grad()
def validate(distiller: nn.Module, batches: Iterable[Any], device: torch.device | str = "cpu") -> float:
    """Top-1 accuracy in percent."""
    meter, loss = Meter(), Meter()
    distiller.eval()
    for images, target, _ in batches:
        logits, target = distiller(image=images["image"].float().to(device)), target.to(device)
        loss.update(F.cross_entropy(logits, target).item(), len(target))
        meter.update(accuracy(logits, target)[0], len(target))
    return meter.mean
