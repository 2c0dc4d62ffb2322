"""Rows of all processes as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .precision import at_least_float32


def this_process() -> tuple[int, int]:
    """Rank and number of the processes that train together; ``(0, 1)`` for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class _Batch:
    """Facts of the current batch, set by :func:`batch_of_processes`."""

    counts: Sequence[int] | None = None
    gathered = False


@contextmanager
def batch_of_processes(counts: Sequence[int] | None, *, gathered: bool = False) -> Iterator[None]:
    """Context of a method's forward pass: how many rows of the batch each process has.

    Args:
        counts: number of rows by rank; ``None``: equal numbers.
        gathered: the method already has the rows of all processes. :func:`gather_with_gradient` then returns its input.
    """
    before = _Batch.counts, _Batch.gathered
    _Batch.counts, _Batch.gathered = counts, gathered
    try:
        yield
    finally:
        _Batch.counts, _Batch.gathered = before


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """The rows of all processes, in the order of the ranks. With one process, ``tensor`` itself.

    This is for losses that compare images with each other. Every process computes the loss of the global batch from the
    same rows. The backward pass sums, over the processes, the gradient of a process's own rows. DistributedDataParallel
    then takes the *mean* of the gradients over processes. Together they give the gradient of the mean of the processes'
    losses. If every process computes the loss of the global batch, this equals, up to rounding, the gradient of one
    process with the global batch.

    This holds for parameters before and after the gather, so a loss needs no factor for the number of processes. Losses
    on a process's own rows (cross-entropy) may be added. If processes have different numbers of rows, the trainer
    weights each process's losses by its share.

    Forward and backward pass are collective: every process must call both, in the same order. So all processes must
    agree on whether the tensor needs a gradient. Second derivatives are not supported.

    Args:
        tensor: ``(B, ...)``, of one shape and type in all processes; gradient flows. B may differ if the trainer has
            given the number of images of each process (:func:`batch_of_processes`). B is a multiple of that number.

    Returns:
        ``(W * B, ...)``, W the number of processes.

    Raises:
        ValueError: B is no multiple of the number of images.
    """
    _, world = this_process()
    if world == 1 or _Batch.gathered:
        return tensor
    return join_rows(tensor, _rows(tensor, _Batch.counts, world))


def _rows(tensor: Tensor, counts: Sequence[int] | None, world: int) -> list[int]:
    """How many rows of this tensor each process has."""
    if counts is None or len(set(counts)) == 1:
        return [len(tensor)] * world
    own = counts[this_process()[0]]
    if len(tensor) % own:
        raise ValueError(f"a tensor of {len(tensor)} rows cannot be gathered: processes have {list(counts)} images")
    return [len(tensor) // own * count for count in counts]


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes without gradient, in the order of the ranks. Memory banks are updated with these rows.

    Collective, as :func:`gather_with_gradient`.

    Args:
        tensor: ``(B, ...)``, of one type and width in all processes. B may differ, as in :func:`gather_with_gradient`.

    Returns:
        ``(sum of all B, ...)``; with one process ``tensor`` itself, detached.
    """
    return gather_with_gradient(tensor.detach())


def join_rows(tensor: Tensor, rows: Sequence[int], *, same_losses: bool = False) -> Tensor:
    """:func:`gather_with_gradient` with ``rows[r]`` rows in process r.

    Args:
        tensor: ``(rows[own rank], ...)``; gradient flows. NHWC images and maps stay in that layout.
        rows: number of rows of each process, at least 1.
        same_losses: all processes compute the same loss from the gathered rows. The sum of the gradients is then W
            times the process's own gradient, and the backward pass is not collective.
    """
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return _Gather.apply(tensor.permute(0, 2, 3, 1), rows, same_losses).permute(0, 3, 1, 2)
    return _Gather.apply(tensor, rows, same_losses)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Sequence[int], same_losses: bool) -> Tensor:
        ctx.rows, ctx.same_losses = rows, same_losses
        most = max(rows)
        own = tensor.contiguous()
        if len(own) < most:
            own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        parts = [torch.empty_like(own) for _ in rows]
        dist.all_gather(parts, own)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rank = dist.get_rank()
        if ctx.same_losses:
            return gradient.split(list(ctx.rows))[rank] * len(ctx.rows), None, None
        total = at_least_float32(gradient).clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(total)
        return total.split(list(ctx.rows))[rank].to(gradient.dtype), None, None
