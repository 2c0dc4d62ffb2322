"""Features of a timm network by ``forward_intermediates``; all 98 families of timm 1.0 have this method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError

PLAIN_STAGES = 4  # maps of a network whose maps have one size
MOST_MAPS = 6  # of a network whose maps shrink; more of them are blocks, not stages


def able(network: nn.Module) -> bool:
    """Whether a network has ``forward_intermediates``."""
    return all(hasattr(network, name) for name in ("forward_intermediates", "forward_head", "get_classifier"))


class TimmReader:
    """Runs a network and returns its logits, its maps ``(B, C, H, W)`` and its pooled features.

    Args:
        maps: numbers of the intermediates that are maps.
        direct: the classifier computes the logits from the pooled features. Otherwise the head runs twice, since some
            heads average two classifiers.
    """

    def __init__(self, maps: Sequence[int], direct: bool) -> None:
        self.maps, self.direct = list(maps), direct

    def __call__(
        self, network: nn.Module, forward: Callable[[Tensor], Any], image: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        last, maps = network.forward_intermediates(image, indices=self.maps, output_fmt="NCHW")
        pooled = network.forward_head(last, pre_logits=True)
        logits = network.get_classifier()(pooled) if self.direct else network.forward_head(last)
        return logits, maps, pooled


def reader_of(network: nn.Module, image: Tensor, maps: Sequence[int]) -> tuple[TimmReader, list[torch.Size]]:
    """A reader of a network, and the shapes of its maps.

    Args:
        network: in eval mode.
        image: ``(1, 3, H, W)``.
        maps: numbers of its intermediates; empty: chosen by :func:`stages_of`.

    Raises:
        InputError: no such number.
    """
    last, found = network.forward_intermediates(image, output_fmt="NCHW")
    for number in maps:
        if not 0 <= number < len(found):
            raise InputError(f"{type(network).__name__} has the maps 0 to {len(found) - 1}, not {number}")
    indices = list(maps) or stages_of([tuple(each.shape[2:]) for each in found])
    pooled = network.forward_head(last, pre_logits=True)
    classifier, logits = network.get_classifier(), network.forward_head(last)
    direct = isinstance(classifier, nn.Module) and pooled.ndim == 2
    if direct:
        try:
            direct = torch.equal(classifier(pooled), logits)
        except (RuntimeError, TypeError, NotImplementedError):  # a head of another form
            direct = False
    return TimmReader(indices, direct), [found[number].shape for number in indices]


def stages_of(sizes: Sequence[tuple[int, ...]]) -> list[int]:
    """Numbers of the maps that are stages: the last map of each size, or evenly spaced maps if all have one size."""
    count = len(sizes)
    if len(set(sizes)) == 1 and count > PLAIN_STAGES:
        return [(number + 1) * count // PLAIN_STAGES - 1 for number in range(PLAIN_STAGES)]
    if count <= MOST_MAPS:
        return list(range(count))
    return [number for number in range(count) if number == count - 1 or sizes[number] != sizes[number + 1]]
