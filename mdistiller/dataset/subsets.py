"""Part of the training images, the same share of every class, drawn by keys and hence reproducible.

Targets that are no class numbers count as one class. Within a class the images have one fixed random order for given
keys, and every subset is a beginning of it: 10 % of the images are among the 20 % for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdistiller.functional import draws
from mdistiller.registry import InputError

from .views import name_key


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the images left to train on and of those held out.

    Args:
        labels: ``(N,)`` of the images there are.
        fraction: ``DATASET.VAL_FRACTION``, held out of each class.

    Raises:
        InputError: one of the two would have no image of some class.
    """
    labels = _classes(labels)
    smallest = _smallest_class(labels)
    taken = int(_share(torch.tensor(smallest), fraction))
    if not 0 < taken < smallest:
        raise InputError(
            f"DATASET.VAL_FRACTION={fraction} holds out {max(taken, 0)} of the {smallest} training images "
            f"of the smallest class; training and validation need at least one each, as "
            f"{1 / smallest:.3g} to {1 - 1 / smallest:.4g} give; 0 turns validation off"
        )
    held_out = stratified_mask(labels, fraction, seed, name_key("validation images"))
    return _positions(~held_out), _positions(held_out)


def reduce_train(labels: Tensor, fraction: float, per_class: int, seed: int) -> Tensor | None:
    """Positions of the images to train on, in rising order; ``None``: all of them.

    Args:
        labels: ``(N,)`` of the images there are.
        fraction: ``DATASET.TRAIN_FRACTION``, of each class; 1: all.
        per_class: ``DATASET.TRAIN_PER_CLASS``, images of each class; 0: all.
    Raises:
        InputError: both are given, or there are not enough images, or ``per_class`` without class numbers.
    """
    if fraction == 1 and per_class == 0:
        return None
    if fraction != 1 and per_class != 0:
        raise InputError(
            f"DATASET.TRAIN_FRACTION={fraction} and DATASET.TRAIN_PER_CLASS={per_class} are both set; "
            "leave one at its default (1.0 and 0)"
        )
    if per_class:
        check_class_numbers(labels, "DATASET.TRAIN_PER_CLASS")
    labels = _classes(labels)
    smallest = _smallest_class(labels)
    keys = (seed, name_key("training images"))
    if per_class:
        if not 0 < per_class <= smallest:
            raise InputError(
                f"DATASET.TRAIN_PER_CLASS={per_class}, but the smallest class has {smallest} training "
                f"images; give 1 to {smallest}, or 0 for all"
            )
        return _positions(class_ranks(labels, *keys) < per_class)
    if fraction > 1 or _share(torch.tensor(smallest), fraction) < 1:
        raise InputError(
            f"DATASET.TRAIN_FRACTION={fraction}, but the smallest class has {smallest} training images; give "
            f"{1 / smallest:.3g} to 1, which leaves at least one of each class"
        )
    return _positions(stratified_mask(labels, fraction, *keys))


def stratified_mask(labels: Tensor, fraction: float, *keys: int) -> Tensor:
    """``(N,)`` bool: true for ``fraction`` of each class, rounded to whole images, drawn by the keys."""
    return class_ranks(labels, *keys) < _share(labels.bincount(), fraction)[labels]


def class_ranks(labels: Tensor, *keys: int) -> Tensor:
    """``(N,)``: the place of each image in the random order of its class, from 0."""
    return ranks_in_class(labels, draws.permutation(len(labels), *keys))


def ranks_in_class(labels: Tensor, order: Tensor) -> Tensor:
    """``(N,)``: the place of each image among those of its class, from 0, in the order of all images ``(N,)``."""
    by_class = order[labels[order].argsort(stable=True)]
    count = labels.bincount()
    first = count.cumsum(0) - count
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return ranks


def check_class_numbers(targets: Tensor, reader: str) -> None:
    """Refuse targets that are no class numbers ``(N,)``.

    Args:
        targets: of a data set.
        reader: what needs class numbers, for the message.

    Raises:
        InputError: they are numbers of another kind, or several for each image.
    """
    if not _are_class_numbers(targets):
        kind, shape = str(targets.dtype).removeprefix("torch."), ", ".join(map(str, ("N", *targets.shape[1:])))
        raise InputError(f"{reader} needs class numbers, integers (N,); the data set's targets are {kind} ({shape})")


def _are_class_numbers(targets: Tensor) -> bool:
    return targets.ndim == 1 and not targets.is_floating_point()


def _classes(targets: Tensor) -> Tensor:
    return targets if _are_class_numbers(targets) else torch.zeros(len(targets), dtype=torch.int64)


def _share(count: Tensor, fraction: float) -> Tensor:
    return (count.double() * fraction + 0.5).floor().long()


def _smallest_class(labels: Tensor) -> int:
    count = labels.bincount()
    return int(count[count > 0].min())


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
