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
    """Rank and number of the processes that train together; ``(0, 1)`` where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class _Batch:
    """What is known of the batch under way; set by :func:`batch_of_processes`."""

    counts: Sequence[int] | None = None
    gathered = False


@contextmanager
def batch_of_processes(counts: Sequence[int] | None, *, gathered: bool = False) -> Iterator[None]:
    """Around a method's forward pass: how many rows of the batch each process has.

    Args:
        counts: by rank; ``None``: equally many.
        gathered: the method has the rows of all processes already, so :func:`gather_with_gradient` changes nothing.
    """
    before = _Batch.counts, _Batch.gathered
    _Batch.counts, _Batch.gathered = counts, gathered
    try:
        yield
    finally:
        _Batch.counts, _Batch.gathered = before


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """The rows of all processes, those of rank 0 first; ``tensor`` itself where there is one process.

    For losses that compare images with each other. Every process computes the loss of the global batch from the same
    rows, and the backward pass sums, over processes, the gradient that reaches a process's own rows. Together with the
    *mean* of gradients over processes, which DistributedDataParallel takes, this is the gradient of the mean of the
    processes' losses: if each computes the loss of the global batch, that of one process with the global batch, to
    rounding. This holds for parameters before the gather and after it, so that nothing is to be multiplied by the
    number of processes; losses on a process's own rows (cross-entropy) may be added. Where processes have unequally
    many rows, the trainer weights each process's losses by its share.

    Forward and backward are collective: every process must take part in both, in one order. So whether the tensor needs
    a gradient must not differ between them. Its own gradient may not be differentiated again.

    Args:
        tensor: ``(B, ...)``, of one shape and type in all processes; gradient flows. B may differ where the trainer
            has told how many images each process has, see :func:`batch_of_processes`; it is a multiple of that then.

    Returns:
        ``(W * B, ...)``, W the number of processes.
    """
    _, world = this_process()
    if world == 1 or _Batch.gathered:
        return tensor
    return join_rows(tensor, _rows(tensor, _Batch.counts, world))


def _rows(tensor: Tensor, counts: Sequence[int] | None, world: int) -> list[int]:
    """How many rows of this kind of tensor each process has."""
    if counts is None or len(set(counts)) == 1:
        return [len(tensor)] * world
    own = counts[this_process()[0]]
    if len(tensor) % own:
        raise ValueError(f"a tensor of {len(tensor)} rows cannot be gathered: processes have {list(counts)} images")
    return [len(tensor) // own * count for count in counts]


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes without gradient, those of rank 0 first; what memory banks are written with.

    Collective, as :func:`gather_with_gradient`.

    Args:
        tensor: ``(B, ...)``, of one type and width in all processes. B may differ, as there.

    Returns:
        ``(sum of all B, ...)``; with one process ``tensor`` itself, detached.
    """
    return gather_with_gradient(tensor.detach())


def join_rows(tensor: Tensor, rows: Sequence[int], *, same_losses: bool = False) -> Tensor:
    """What :func:`gather_with_gradient` does, for ``rows[r]`` rows in process r.

    Args:
        tensor: ``(rows[own rank], ...)``; gradient flows. The layout of images and maps (NHWC) is kept.
        rows: at least one each.
        same_losses: all processes compute one and the same loss of what is gathered. The sum of the gradients is
            then the own one times W, and the backward pass is not collective.
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
        total = at_least_float32(gradient).clone(memory_format=torch.contiguous_format)  # the sum is taken in place
        dist.all_reduce(total)
        return total.split(list(ctx.rows))[rank].to(gradient.dtype), None, None
