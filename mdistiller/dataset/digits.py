"""Digits: 1,797 handwritten digits of 8x8 pixels in 17 grey levels, which scikit-learn carries with it.

They are the test half of Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. UCI, 1998. The split is
ours, since there is none: 70 % of each class for training, always the same images.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from mdistiller.registry import InputError

from .base import DataSet, Split, register_dataset, resize_images
from .randaugment import RandAugment
from .subsets import stratified_mask
from .views import Cutout, RandomCrop, View, name_key, rotations

TEST_FRACTION = 0.3
SPLIT_KEY = name_key("digits test split")  # in place of a seed: the split is part of the data set


@register_dataset("digits")
class Digits(DataSet):
    """No view flips: a mirrored digit is not a digit."""

    num_classes = 10
    image_size = 16
    mean = (0.3059, 0.3059, 0.3059)
    std = (0.3187, 0.3187, 0.3187)
    model_family = "cifar"
    views: ClassVar[dict[str, View]] = {
        "plain": (),
        "weak": (RandomCrop(),),
        "strong": (RandomCrop(), RandAugment(n=2), Cutout()),
        **rotations((RandomCrop(),)),
    }

    def load(self) -> tuple[Split, Split]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("data set digits comes with scikit-learn: pip install scikit-learn") from error
        bundled = load_digits()
        level = torch.from_numpy(bundled.images)[:, None] * (255 / 16)
        targets = torch.from_numpy(bundled.target).long()
        whole = Split(resize_images(level, self.image_size).repeat(1, 3, 1, 1), targets)
        in_test = stratified_mask(targets, TEST_FRACTION, SPLIT_KEY)
        return whole.take((~in_test).nonzero()[:, 0]), whole.take(in_test.nonzero()[:, 0])
