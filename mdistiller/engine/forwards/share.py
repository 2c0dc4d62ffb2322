"""The link that divides a pass through a network among processes: each process computes the rows of its images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller.functional.gather import join_rows

from ..processes import distributed
from .on_access import read_on_access


class Share:
    """A link for the place ``share`` of a chain.

    Inputs that are no batch of views of the images are not divided: each process computes all of them.

    Args:
        counts: number of the batch's images in each process.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts

    def __call__(self, following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        count = len(tensors[0]) if tensors else 0
        if not count or count % sum(self.counts):
            return following(*args, **kwargs)
        rows = _Rows(count, self.counts)

        def cut(value: Any) -> Any:
            return rows.of_this_process(value) if has_rows(value, count) else value

        output = following(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        return read_on_access(output, lambda part: rows.whole(part) if isinstance(part, Tensor) else part)


def has_rows(value: Any, count: int) -> bool:
    """Whether a value is a tensor ``(count, ...)``."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


class _Rows:
    """The rows of ``(count, ...)`` for each process: the rows of the views of its images.

    A method may join several views in one pass. Then ``count`` is a multiple of the batch.
    """

    def __init__(self, count: int, counts: Sequence[int]) -> None:
        self.count, self.images, self.rank = count, tuple(counts), distributed.rank()
        self.views = count // sum(counts)
        self.counts = [self.views * images for images in counts]

    def of_this_process(self, tensor: Tensor) -> Tensor:
        if self.views == 1:
            return tensor.split(self.counts)[self.rank]
        return tensor[_by_process(self.count, self.images, tensor.device)[0].split(self.counts)[self.rank]]

    def whole(self, tensor: Tensor) -> Tensor:
        if not has_rows(tensor, self.counts[self.rank]):
            return tensor
        with torch.set_grad_enabled(tensor.requires_grad):  # a method may read features later, within no_grad
            gathered = join_rows(tensor, self.counts, same_losses=True)
            return gathered if self.views == 1 else gathered[_by_process(self.count, self.images, tensor.device)[1]]


@functools.lru_cache(maxsize=64)
def _by_process(count: int, images: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows in the order of their processes, and the inverse order."""
    parts = torch.arange(count).view(-1, sum(images)).split(images, dim=1)
    order = torch.cat([part.flatten() for part in parts])
    return order.to(device), order.argsort().to(device)
