"""Rows of all processes as one batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes without gradient, those of rank 0 first; what memory banks are written with.

    Collective, as :func:`gather_with_gradient`; but the number of rows may differ between processes.

    Args:
        tensor: ``(B, ...)``, of one type and width in all processes.

    Returns:
        ``(sum of all B, ...)``; with one process ``tensor`` itself, detached.
    """
    count, tensor = num_processes(), tensor.detach()
    if count == 1:
        return tensor
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    sizes = [int(size) for size in sizes]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """The rows of all processes, those of rank 0 first; ``tensor`` itself where there is one process.

    For losses that compare images with each other. Every process computes the loss of the global batch from the same
    rows, and the backward pass sums, over processes, the gradient that reaches a process's own rows. Together with the
    *mean* of gradients over processes, which DistributedDataParallel takes, this is the gradient of the mean of the
    processes' losses: if each computes the loss of the global batch, that of one process with the global batch, to
    rounding. This holds for parameters before the gather and after it, so that nothing is to be multiplied by the
    number of processes; losses on a process's own rows (cross-entropy) may be added, if all have equally many.

    Forward and backward are collective: every process must take part in both, in one order. So whether the tensor needs
    a gradient must not differ between them. Its own gradient may not be differentiated again.

    Args:
        tensor: ``(B, ...)``, of one shape and type in all processes; gradient flows.

    Returns:
        ``(W * B, ...)``, W the number of processes.
    """
    return tensor if num_processes() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # the sum is taken in place
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
