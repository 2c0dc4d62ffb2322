"""Rows of all processes as one batch, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


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
